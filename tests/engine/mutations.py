"""Breaks a copy of the engine on purpose, one line at a time, and says which tests see it.

    python -m tests.engine.mutations [NAME …]

Exit code 1 if a mutation survives, or if the untouched copy does not pass.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("protos", "scheduler_svc", "client", "worker_svc", "kernels", "tests")
ENGINE = "scheduler_svc/engine"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    # The five that the design asks for.
    Mutation(
        "an off-by-one in block covering",
        "planner.py",
        "if hi + drafts > len(sequence.block_ids) * self.kv.block_size:",
        "if hi + drafts - 1 > len(sequence.block_ids) * self.kv.block_size:",
    ),
    Mutation(
        "publish too early",
        "kv_manager.py",
        "full = min(sequence.computed, sequence.settled) // self.block_size",
        "full = sequence.settled // self.block_size",
    ),
    Mutation("release before the fence", "device.py", "if sequence.flying:", "if False:"),
    Mutation(
        "forget to clear on epoch",
        "roster.py",
        "            sequence.forget_device()\n            if sequence.state is State.RUNNING:\n",
        "            if sequence.state is State.RUNNING:\n",
    ),
    Mutation("wrong settled", "sequence.py", "self.settled += len(token_ids)", "self.settled += 1"),
    Mutation(
        "nobody follows out of the queue",
        "forecast.py",
        "if queued else 0.0\n        decode",
        "if 0 else 0\n        decode",
    ),
    Mutation("a gate closed for good", "door.py", "min(MAX_SHED, SHED_SHARE * waiting / self._rate)", "MAX_SHED"),
    Mutation("what was shed stands in no line", "door.py", "        self._sequences.refuse(sequences)\n", ""),
    # More of the same kind.
    Mutation(
        "hit in the step that fills",
        "planner.py",
        "        else:\n            sequence.computed += count\n",
        "        else:\n            sequence.computed += count\n"
        "            self.roster.wait_again(self.kv.publish(sequence))\n",
    ),
    Mutation(
        "one row past the limit",
        "planner.py",
        "room = sequence.limit - hi - 1",
        "room = sequence.limit - hi",
    ),
    Mutation(
        "a full-prompt hit",
        "kv_manager.py",
        "min(sequence.settled - 1, sequence.reusable)",
        "min(sequence.settled, sequence.reusable)",
    ),
    Mutation("hits that ignore align", "kv_manager.py", "lcm(block_size, align)", "lcm(block_size, 1)"),
    Mutation(
        "chunks that ignore align",
        "planner.py",
        "return count if count == missing else count - (computed + count) % self.device.align",
        "return count",
    ),
    Mutation(
        "a start that nobody knows",
        "planner.py",
        "start = -1 if sequence.ahead else sequence.computed",
        "start = sequence.computed",
    ),
    Mutation(
        "drafts counted once",
        "scheduler.py",
        "sequence.ahead -= 1 + row.num_drafts",
        "sequence.ahead -= len(answer.token_ids)",
    ),
    Mutation("tokens after the end", "scheduler.py", "count = sequence.first_end(token_ids)", "count = len(token_ids)"),
    Mutation(
        "results of a dead epoch",
        "scheduler.py",
        "for device in self.devices.values() if device.epoch == epoch",
        "for device in self.devices.values()",
    ),
    Mutation(
        "the preempted are admitted while their results are due",
        "roster.py",
        "        sequence.flying = flying  # their results are still delivered\n",
        "        flying = 0\n",
    ),
    Mutation("the oldest is preempted", "policy.py", "else running[-1]", "else running[0]"),
    Mutation(
        "blocks are taken without a look at tenants",
        "policy.py",
        "return max(running, key=turn) if several_tenants else running[-1]",
        "return running[-1]",
    ),
    Mutation(
        "nobody is displaced",
        "planner.py",
        "            if self.roster.ledger.several:\n                self._displace(step)\n",
        "",
    ),
    Mutation(
        "displaced in turns",
        "policy.py",
        "return parts * (newcomer.running + 1) * other.weight <= (other.running - 1) * newcomer.weight",
        "return True",
    ),
    Mutation(
        "displaced though it has had less",
        "policy.py",
        "if other is newcomer or behind < 0:",
        "if other is newcomer:",
    ),
    Mutation("displaced by a worse priority", "policy.py", " and s.submit.priority >= priority", ""),
    Mutation(
        "a victim that has its row already",
        "planner.py",
        "return tuple(sorted(running, key=turn))",
        "return tuple(running)",
    ),
    Mutation("weights that weigh nothing", "fairness.py", "config.output_cost / tenant.weight", "config.output_cost"),
    Mutation("nobody is lifted", "fairness.py", "max(0.0, floor - self.counter)", "0.0"),
    Mutation(
        "lifted only while others wait",
        "fairness.py",
        "min(counters, default=self._passed)",
        "min(counters, default=0.0)",
    ),
    Mutation("half is enough", "policy.py", "parts = 1 if behind > far else 2", "parts = 2"),
    Mutation(
        "a prompt costs nothing", "planner.py", "sequence.account.paid += paid", "sequence.account.paid += 0 * paid"
    ),
    Mutation("a prompt is paid again", "planner.py", "            sequence.unpaid -= paid\n", ""),
    Mutation(
        "those who run go before newcomers",
        "planner.py",
        "if first and (chunk is None or turn(first) < turn(chunk)):",
        "if first and chunk is None:",
    ),
    Mutation(
        "a tenant is forgotten with its counter",
        "fairness.py",
        "if not a.live and (floor is None or a.counter <= floor)",
        "if not a.live",
    ),
    Mutation(
        "preempt and admit in one step",
        "planner.py",
        "is_open = not step.preempted",
        "is_open = True",
    ),
    Mutation(
        "a leader leaves in silence",
        "roster.py",
        "        woken = device.kv.cache.stop_leading(sequence)\n",
        "        device.kv.cache.stop_leading(sequence)\n        woken: list[Sequence] = []\n",
    ),
    Mutation(
        "a salt that nobody tastes",
        "prefix_cache.py",
        "return _digest(tenant.encode(), salt.encode(), adapter.encode())",
        "return _digest(tenant.encode(), adapter.encode())",
    ),
    Mutation(
        "the queue is whose came first", "door.py", "self.crowded_out = self._crowd(submit, roster, free)", "pass"
    ),
    Mutation("crowded out by more", "door.py", "has_room and come * crowd.weight <= left * own.weight", "has_room"),
    Mutation("crowded out though begun", "door.py", "if sequence.cached_tokens < 0:", "if True:"),
    Mutation(
        "crowded out by a worse priority",
        "door.py",
        "<= 0 or sequence.submit.priority < submit.priority:",
        "<= 0:",
    ),
    Mutation(
        "any priority for anybody",
        "door.py",
        "if submit.priority < (best := ",
        "if submit.priority < -999 + 0 * (best := ",
    ),
    Mutation("a deadline at its word", "door.py", "if estimate.total <= left:", "if True:"),
    Mutation("a queue that nobody counts", "forecast.py", "wait += self._seconds(work)", "wait += 0.0"),
    Mutation(
        "another tenant's whole queue is ahead",
        "forecast.py",
        "min(self._seconds(work), own_turn * account.weight / own.weight)",
        "self._seconds(work)",
    ),
    Mutation("the hopeless wait", "scheduler.py", "if self._forecast.is_hopeless(sequence):", "if False:"),
    Mutation("the hopeless are begun", "planner.py", "if not self.forecast.is_hopeless(sequence):", "if True:"),
    Mutation("who runs is given up", "roster.py", "        self.expect(sequence, 0.0)\n", ""),
    Mutation(
        "lengths are not learned",
        "forecast.py",
        "if _can_end(sampling):\n            self",
        "if False:\n            self",
    ),
    Mutation("a stall is a pace", "forecast.py", "seconds = min(seconds, OUTLIER * usual)", "pass"),
    Mutation(
        "a bucket without a bottom", "door.py", "if not (wait := bucket.missing(tokens)):", "if (wait := 0.0) == 0.0:"
    ),
    Mutation("output tokens are free", "quota.py", " - (output_tokens - self._seen)", ""),
    Mutation("a bucket that runs over", "quota.py", "min(self.burst, self.level + ", "(self.level + "),
    Mutation(
        "one prompt for all siblings",
        "door.py",
        "_request_tokens(submit)\n        bucket",
        "len(submit.token_ids)\n        bucket",
    ),
    Mutation("what never ran is paid", "scheduler.py", "bucket.level + sequence.given", "bucket.level"),
    Mutation(
        "tenants in one cache",
        "prefix_cache.py",
        "return _digest(tenant.encode(), salt.encode(), adapter.encode())",
        "return _digest(salt.encode(), adapter.encode())",
    ),
    Mutation(
        "an evicted block is still found",
        "block_pool.py",
        "        del self.by_hash[digest]\n",
        "",
    ),
    Mutation("a pooled prompt is read from the cache", "sequence.py", ' or submit.pooling in ("mean", "cls")', ""),
    Mutation("a prompt ends early", "trust.py", "row.start + row.num_tokens == sequence", "row.num_tokens == sequence"),
    Mutation("the scored are cached", "sequence.py", "prompt_logprobs_from - 1 if", "prompt_logprobs_from if"),
    Mutation("a dead group takes all along", "roster.py", "if sequence.device is not device:", "if False:"),
    Mutation(
        "who is expected is never looked at",
        "planner.py",
        "        self.roster.wait_again(self.kv.cache.take_expected())\n",
        "",
    ),
    Mutation("nobody waits for a prefix elsewhere", "planner.py", "if self.placement.has_choice:\n", "if False:\n"),
    Mutation("any saving is worth a wait", "placement.py", "cost -= SEQUENCE_COST", "cost -= 0"),
    Mutation("a prefix draws everybody", "placement.py", "SEQUENCE_COST * (running", "0 * (running"),
    Mutation("a prefix draws nobody", "placement.py", "sequence.settled - cached", "sequence.settled"),
    Mutation(
        "blocks are not looked at elsewhere",
        "kv_manager.py",
        "return len(hits) * self.block_size if self.room_for(sequence, hits, reserve) else None",
        "return len(hits) * self.block_size",
    ),
    Mutation(
        "forced tokens come behind all others",
        "planner.py",
        "            for sequence in first:\n",
        "            for sequence in sorted(first, key=lambda each: bool(each.unsent)):\n",
    ),
    Mutation("forced tokens take the step", "planner.py", "step.budget - step.for_samples)\n", "step.budget)\n"),
    Mutation(
        "drafts bring more than they do",
        "speculation.py",
        "tokens, positions, most, total = plain, plain, 0, 0",
        "tokens, positions, most, total = plain + 4, plain, 0, 0",
    ),
    Mutation("looks cost nothing", "speculation.py", "return self._saved >=", "return True or self._saved >="),
    Mutation("the newest group's lengths", "lengths.py", "min(self._limits.values())", "self._limits[ready.group]"),
    Mutation(
        "one line of epochs for all groups",
        "scheduler.py",
        "self._last_epochs.get(ready.group)",
        "max(self._last_epochs.values(), default=None)",
    ),
    Mutation(
        "an abort of another frontend's", "scheduler.py", 'if event.frontend in ("", sequence.frontend):', "if True:"
    ),
    Mutation(
        "a host block is reused before its copy has landed",
        "host_tier.py",
        "if not self.by_hash or self.fences[next(iter(self.by_hash.values()))]:",
        "if not self.by_hash:",
    ),
    Mutation(
        "what is read in the host is not fenced",
        "host_tier.py",
        "        host_block = self.by_hash[digest]\n        self.fences[host_block] += 1\n",
        "        host_block = self.by_hash[digest]\n        self.fences[host_block] += 0\n",
    ),
    Mutation(
        "found in the host by the plan that copies there",
        "host_tier.py",
        "        self._arriving.append((digest, host_block))\n",
        "        self.by_hash[digest], self.hashes[host_block] = host_block, digest\n",
    ),
    Mutation(
        "blocks come back in the wrong order",
        "kv_manager.py",
        "zip(loads, sources, strict=True)",
        "zip(loads, reversed(sources), strict=True)",
    ),
    Mutation(
        "a block from the host is found by the plan that brings it",
        "kv_manager.py",
        "            self.host.load(source, sequence.block_ids[i])\n",
        "            self.host.load(source, sequence.block_ids[i])\n"
        "            self.cache.publish(sequence.block_ids[i], sequence.hashes[i])\n",
    ),
    Mutation("loaded twice", "prefix_cache.py", " or digest in self._leaders):", "):"),
    Mutation("nothing goes to the host", "block_pool.py", "self.host.save(digest, block)", "digest"),
    Mutation("watchers are told too soon", "block_pool.py", "if digest and not self.holds(digest):", "if digest:"),
    Mutation("copies are believed", "trust.py", "if result.copied != [", "if False and result.copied != ["),
    Mutation("suspects in company", "sequence.py", "return self.deaths >= SUSPECT_DEATHS", "return False"),
    Mutation(
        "prompt logprobs twice",
        "sequence.py",
        "self.prompt_logprobs_from += len(new)",
        "self.prompt_logprobs_from += 0",
    ),
]


def copy(to: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.so")
    for name in COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", to)


def apply(mutation: Mutation, tree: Path) -> None:
    path = tree / ENGINE / mutation.file
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.name}: {mutation.file} has {source.count(mutation.old)} times {mutation.old!r}")
    path.write_text(source.replace(mutation.old, mutation.new))


def red_tests(tree: Path) -> list[str]:
    """The names of the engine tests that fail in `tree`."""
    command = [sys.executable, "-m", "pytest", "tests/engine", "-q", "-m", "not nightly", "-p", "no:cacheprovider"]
    command += ["--tb=no", "-rfE", "--timeout=300"]
    env = {**os.environ, "PAGEWIRE_HYPOTHESIS_PROFILE": "mutation", "PYTHONDONTWRITEBYTECODE": "1"}
    ran = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if ran.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run:\n{ran.stdout}{ran.stderr}")
    return re.findall(r"^(?:FAILED|ERROR) tests/engine/(\S+)", ran.stdout, re.MULTILINE)


def main() -> int:
    wanted = [m for m in MUTATIONS if not sys.argv[1:] or any(name in m.name for name in sys.argv[1:])]
    survivors = []
    with tempfile.TemporaryDirectory() as scratch:
        clean = Path(scratch, "clean")
        copy(clean)
        if red := red_tests(clean):
            print(f"the untouched copy fails: {red}")
            return 1
        print("untouched: all green")
        for number, mutation in enumerate(wanted):
            tree = Path(scratch, str(number))
            copy(tree)
            apply(mutation, tree)
            red = red_tests(tree)
            machine = [name for name in red if "test_state_machine" in name]
            others = [name for name in red if name not in machine]
            shown = machine + others[:3] + ([f"… {len(others) - 3} more"] if len(others) > 3 else [])
            print(f"{mutation.name}: {'red: ' + ', '.join(shown) if red else 'SURVIVED'}", flush=True)
            shutil.rmtree(tree)
            survivors += [] if red else [mutation.name]
    print(f"{len(wanted) - len(survivors)} of {len(wanted)} mutations turned a test red")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
