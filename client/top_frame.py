"""One frame of `pagewire top`. What a service says of itself is shown as text, and none of it can move the cursor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pagewire.v1.admin_pb2 import GetStatsResponse, WorkerState
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from client.figures import WINDOW, Change

MOST_TENANTS, MOST_LOSSES, BAR = 10, 5, 40
SHARES = (0.5, 0.9, 0.99)
LATENCIES = {
    "first_token": "first token",
    "between_tokens": "between tokens",
    "queue_wait": "in the queue",
    "stream": "whole stream",
    "step": "step",
}
COLOURS = {"serving": "green", "loading": "yellow", "starting": "yellow", "lost": "bold red"}


@dataclass(frozen=True)
class Head:
    address: str
    model: str = ""
    trouble: str = ""  # why nobody answers; then the figures are those of the last time somebody did


def frame(head: Head, change: Change | None) -> RenderableType:
    parts: list[RenderableType] = [_title(head, change)]
    if head.trouble:
        parts.append(Text(f"  {_plain(head.trouble)}: trying again", style="bold red"))
    elif change and not change.now.serving:
        parts.append(Text(f"  {_plain(change.now.reason)}", style="bold red"))
    if change is None:
        return Group(*parts)
    parts += [_numbers(change), _latencies(change), _workers(change)]
    if change.now.tenants:
        parts.append(_tenants(change))
    if change.now.losses:
        parts.append(_losses(change.now))
    return Group(*parts)


def _title(head: Head, change: Change | None) -> RenderableType:
    words = Text.assemble(("pagewire ", "bold"), _plain(head.address))
    if head.model:
        words.append(f"  {_plain(head.model)}")
    if head.trouble:
        words.append("  not reachable", style="bold red")
    elif change is None:
        words.append("  connecting", style="yellow")
    elif change.now.serving:
        words.append("  serving", style="green")
    else:
        words.append("  not serving", style="bold red")
    if change:
        words.append(f"  up {_span(change.now.uptime_seconds)}")
    return words


def _numbers(change: Change) -> RenderableType:
    now = change.now
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    streams = f"{now.running} run, {now.waiting} wait ({now.waiting_tokens:,} tokens), {now.open_calls} calls open"
    ends = f"{now.finished:,} finished, {now.aborted:,} aborted, {now.rejected:,} refused"
    table.add_row("streams", f"{streams}; {ends}")
    cached = now.cached_tokens / now.prompt_tokens if now.prompt_tokens else 0.0
    speed = f"{change.rate('prompt_tokens'):,.0f} in, {change.rate('generated_tokens'):,.0f} out"
    table.add_row("tokens/s", f"{speed}; {cached:.0%} of all prompts came from the cache")
    used = now.owned_blocks + now.fenced_blocks
    table.add_row("KV", _bar(used, now.cached_blocks, now.total_blocks))
    kinds = f"{used:,} used, {now.cached_blocks:,} cached, {now.free_blocks:,} free of {now.total_blocks:,} blocks"
    table.add_row("", f"{kinds}; {now.total_slots - now.free_slots} of {now.total_slots} slots")
    steps = f"{change.rate('steps'):,.1f} a second; {now.preemptions:,} preemptions, {now.recoveries:,} recoveries"
    table.add_row("steps", steps)
    if now.draft_tokens:
        drafts, right = change.rate("draft_tokens"), now.accepted_draft_tokens / now.draft_tokens
        table.add_row("drafts", f"{drafts:,.1f} a second; {right:.0%} of all were right")
    return Panel(table, title="service", title_align="left")


def _bar(used: int, cached: int, total: int) -> Text:
    """Used blocks are full, those of the prefix cache half."""
    full = round(BAR * used / total) if total else 0
    half = min(BAR - full, round(BAR * cached / total)) if total else 0
    text = Text("█" * full, style="cyan")
    text.append("▒" * half, style="dim cyan")
    text.append("·" * (BAR - full - half), style="dim")
    return text.append(f" {used / total:.0%}" if total else " no worker has blocks", style="default")


def _latencies(change: Change) -> RenderableType:
    table = _table("", "p50", "p90", "p99", numbers=3)
    for name, title in LATENCIES.items():
        found = change.quantiles(name, SHARES)
        table.add_row(title, *(["–"] * len(SHARES) if found is None else map(_duration, found)))
    return Panel(table, title=f"seconds, of the last {WINDOW:g} s if there were any", title_align="left")


def _workers(change: Change) -> RenderableType:
    table = _table("worker", "state", "for", "pid", "steps/s", "busy", "in flight", "lost", "", numbers=0)
    for place, worker in enumerate(change.now.workers):
        state = WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
        busy = change.worker_rate(place, "busy_seconds")
        words = [worker.device, f"{worker.progress:.0%}" if worker.progress else "", worker.detail]
        table.add_row(
            str(place),
            Text(state, style=COLOURS.get(state, "")),
            _span(worker.state_seconds),
            str(worker.pid or "–"),
            f"{change.worker_rate(place, 'steps'):.1f}",
            f"{min(busy, 1.0):.0%}",
            str(worker.steps_in_flight),
            str(worker.losses),
            Text(_plain(" ".join(filter(None, words)))),
        )
    return Panel(table, title="workers", title_align="left")


def _tenants(change: Change) -> RenderableType:
    """Those with the most output now come first, then those with the most ever."""
    table = _table("tenant", "run", "wait", "in/s", "out/s", "tokens in", "out", "streams", "refused", numbers=8)
    rates = {t.name: change.tenant_rate(t.name, "output_tokens") for t in change.now.tenants}
    ranked = sorted(change.now.tenants, key=lambda t: (-rates[t.name], -t.output_tokens, t.name))
    for tenant in ranked[:MOST_TENANTS]:
        table.add_row(
            Text(_plain(tenant.name) or "(none)"),
            str(tenant.running),
            str(tenant.waiting),
            f"{change.tenant_rate(tenant.name, 'prompt_tokens'):,.0f}",
            f"{rates[tenant.name]:,.0f}",
            f"{tenant.prompt_tokens:,}",
            f"{tenant.output_tokens:,}",
            f"{tenant.requests:,}",
            f"{tenant.refused:,}",
        )
    more = len(ranked) - MOST_TENANTS
    return Panel(table, title=f"tenants{f', and {more} more' if more > 0 else ''}", title_align="left")


def _losses(now: GetStatsResponse) -> RenderableType:
    table = _table("ago", "pid", "", numbers=0)
    for loss in now.losses[:MOST_LOSSES]:
        table.add_row(_span(loss.seconds_ago), str(loss.pid or "–"), Text(_plain(loss.reason)))
    return Panel(table, title="workers lost", title_align="left")


def _table(*columns: str, numbers: int) -> Table:
    """The last `numbers` columns are right-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(columns):
        right = place >= len(columns) - numbers and numbers
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "")
    return table


def _plain(text: str) -> str:
    return "".join(_visible(text))


def _visible(text: str) -> Iterable[str]:
    return (character if character.isprintable() else "·" for character in text)


def _duration(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _span(seconds: float) -> str:
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    days, rest = divmod(whole, 86400)
    return f"{f'{days} d ' if days else ''}{rest // 3600}:{rest % 3600 // 60:02} h"
