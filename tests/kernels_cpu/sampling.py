"""A table of slots with the C++ sampler, fed with logits of the test's own."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import address
from protos.wire import Mask, TokenLogprobs
from tests.sampler.bench import Bench
from worker_svc.backends.cpu_sampling import CpuSampler, Outputs
from worker_svc.inputs import Ints
from worker_svc.results import build_results
from worker_svc.sampler import Sampled

Floats = NDArray[np.float32]


class CpuBench(Bench):
    """What Bench is with torch's sampler."""

    def __init__(
        self, cdll: ctypes.CDLL, isa: str, vocab_size: int, max_slots: int = 64, max_model_len: int = 64
    ) -> None:
        super().__init__(vocab_size, max_slots, max_model_len)
        self.cdll, self.isa, self.cpu = cdll, isa.encode(), CpuSampler(vocab_size)

    def call(self, out: Outputs, logits: Floats) -> int:
        """How many failed."""
        assert logits.flags.c_contiguous
        where = ctypes.c_void_p(address(logits))
        failed: int = self.cdll.pw_test_sample(self.isa, where, logits.shape[1], ctypes.byref(out))
        return failed

    def step(
        self, slots: Sequence[int], logits: Floats, mask: Mask | None = None, masked: Sequence[int] = ()
    ) -> Sampled:
        plan, inputs = self.plan(slots, masked)
        out = self.cpu.prepare(plan, inputs, self.slots, mask)
        failed = self.call(out, logits)
        sampled = Sampled(*self.cpu.finish(out))
        assert failed == 0, "a failure that no token tells"
        build_results(plan, inputs, self.slots, sampled.token_ids, sampled.logprobs)
        return sampled


class CpuModel:
    """Stands for a library's model whose last forward had these logits [T, V]."""

    def __init__(self, cdll: ctypes.CDLL, isa: str, logits: Floats) -> None:
        self.cdll, self.isa, self.logits = cdll, isa.encode(), logits

    def score(
        self, tokens: Ints, token_ids: Ints, num_top: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], Ints, Ints, NDArray[np.float64]]:
        count, most = len(tokens), int(num_top.max(initial=0))
        logits = np.ascontiguousarray(self.logits[tokens])
        out = np.zeros(count), np.zeros(count, np.int64), np.zeros((count, most), np.int64), np.zeros((count, most))
        pointers = [ctypes.c_void_p(address(array)) for array in (token_ids, num_top)]
        self.failed: int = self.cdll.pw_test_score(
            self.isa,
            ctypes.c_void_p(address(logits)),
            logits.shape[1],
            *pointers,
            count,
            most,
            *(ctypes.c_void_p(address(array)) for array in out),
        )
        return out


def scores(
    cdll: ctypes.CDLL, isa: str, logits: Floats, tokens: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """What worker_svc.sampler.token_logprobs answers."""
    wanted = np.minimum(num_top, logits.shape[1]).astype(np.int32)
    values, ranks, ids, tops = CpuModel(cdll, isa, logits).score(
        np.arange(len(tokens)), np.array(tokens, np.int64), wanted
    )
    return [
        TokenLogprobs(
            token, float(values[i]), int(ranks[i]), tuple(ids[i, : wanted[i]].tolist()), tuple(tops[i, : wanted[i]])
        )
        for i, token in enumerate(tokens)
    ]
