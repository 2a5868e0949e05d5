"""How many KV blocks a device has room for: pure arithmetic, said in full where there is no room."""

from __future__ import annotations

from dataclasses import dataclass

from worker_svc.backends.base import BackendError

_GIB = 1 << 30


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. `peak` is the most that was in use while a step of the largest size ran, weights included; `others` is
    what is in use beside this worker: other processes, and what the driver takes.
    """

    total: int
    peak: int
    others: int


def blocks_that_fit(
    memory: DeviceMemory, share: float, block_bytes: int, block_size: int, max_model_len: int, kv_bytes: int = 0
) -> int:
    """Null block included; `kv_bytes` is what was asked for, 0: what is left of `share` of the memory.

    Raises BackendError where two blocks do not fit, or one sequence of max_model_len tokens (0: of any length).
    """
    most = memory.total - memory.peak - memory.others
    budget = int(memory.total * share) - memory.peak - memory.others
    arithmetic = (
        f"{share:g} of {_gib(memory.total)} less {_gib(memory.peak)} for weights and the largest step, "
        f"less {_gib(memory.others)} that is in use besides, leave {_gib(budget)} for KV"
    )
    if kv_bytes:
        budget, arithmetic = kv_bytes, f"kv_bytes is {_gib(kv_bytes)}"
        if kv_bytes > most:
            raise BackendError(f"kv_bytes is {_gib(kv_bytes)}, and {_gib(most)} of the device's memory are free")
    blocks = max(0, budget) // block_bytes
    needed = 1 + max(1, -(-max_model_len // block_size))
    if blocks < needed:
        tokens = f"a sequence of max_model_len {max_model_len} tokens" if max_model_len else "one block"
        raise BackendError(
            f"{arithmetic}, and {tokens} needs {_gib(needed * block_bytes)}: serve a smaller --max-model-len or "
            "--max-step-tokens, or allow more with --gpu-memory-utilization"
        )
    return blocks


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
