"""What a worker says that cannot be: each function tells why, in one line, or answers with nothing."""

from __future__ import annotations

from protos.wire import Row, RowResult, StepResult
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.device import Device
from scheduler_svc.engine.events import WorkerReady
from scheduler_svc.engine.sequence import Sequence


def unusable(ready: WorkerReady, config: EngineConfig) -> str:
    """Why nothing can be planned for such a group."""
    if ready.groups != 1:
        return f"groups is {ready.groups}: this engine plans for one KV group"
    if ready.align > config.max_step_tokens:
        return f"align is {ready.align}: at most max_step_tokens {config.max_step_tokens}"
    if ready.num_blocks < 2 or ready.max_slots < config.max_num_seqs:
        return (
            f"num_blocks is {ready.num_blocks} and max_slots {ready.max_slots}: "
            f"at least 2, and max_num_seqs {config.max_num_seqs}"
        )
    if ready.num_host_blocks < 0:
        return f"num_host_blocks is {ready.num_host_blocks}: at least 0"
    return ""


def misplaced(device: Device, result: StepResult) -> str:
    """Why it cannot be the result of the oldest plan in flight, whatever its rows say."""
    due = device.sent[0].plan if device.sent else None
    if due is None or result.step != due.step:
        return f"a result for step {result.step}, due was {due and due.step}"
    if len(result.rows) != len(due.rows):
        return f"step {result.step} has {len(due.rows)} rows, its result {len(result.rows)}"
    if result.copied != [host_block for _, _, host_block in due.copies]:
        return f"step {result.step} copied {result.copied}, its plan {due.copies}"
    return ""


def mismatch(row: Row, answer: RowResult, sequence: Sequence) -> str:
    """Why an answer cannot be the row's."""
    if answer.slot != row.slot:
        return f"slot {answer.slot} answers for slot {row.slot}"
    if answer.start != sequence.settled:
        return f"slot {row.slot} has {answer.start} tokens, the engine knows {sequence.settled}"
    count = len(answer.token_ids)
    drafted = answer.num_drafted
    if not (0 <= drafted <= row.num_drafts and (0 < count <= 1 + drafted if row.sample else count == 0)):
        of = f"{drafted} drafts, where the plan has sample={row.sample} and {row.num_drafts} drafts"
        return f"slot {row.slot} brings {count} tokens of {of}"
    pools = bool(sequence.submit.pooling) and completes(sequence, row)
    if bool(answer.pooled) != pools or len(answer.pooled) % 4:
        return (
            f"slot {row.slot} brings {len(answer.pooled)} bytes of pooled floats, due are {'some' if pools else 'none'}"
        )
    return ""


def completes(sequence: Sequence, row: Row) -> bool:
    """Whether the row computes the last of a prompt behind which nothing is sampled."""
    return not sequence.samples and row.start + row.num_tokens == sequence.prompt_len
