"""The device's model behind the interface of the CPU's runners, so that their tests can drive it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu.attention_plan import AttentionShape
from kernels.gpu.attention_tuning import Device
from tests.kernels_triton import compare, interpreter
from tests.models.stepping import Logits
from worker_svc.attention.paged import Rows
from worker_svc.attention.triton import TritonAttention
from worker_svc.gpu.model import GpuModel, StepTensors
from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache, KVShape
from worker_svc.models.loader import DType, open_model

if compare.INTERPRETED:
    interpreter.repair()

WHERE = torch.device(compare.DEVICE)
KIND = Device("sm_90", 4, native_fp8=True) if compare.INTERPRETED else Device.of(WHERE)


class GpuRunner:
    def __init__(
        self,
        path: Path,
        dtype: DType = "float32",
        block_size: int = 8,
        *,
        batch_invariant: bool = False,
        float8: torch.dtype | None = torch.float8_e4m3fn,
        quantization: str = "",
        max_adapters: int = 0,
    ) -> None:
        opened = open_model(path)
        assert opened is not None
        spec, self.max_model_len = opened.spec, opened.spec.max_model_len
        self.model = GpuModel(
            opened,
            dtype,
            WHERE,
            KIND.kind,
            self.max_model_len,
            lambda share: None,
            batch_invariant=batch_invariant,
            float8=float8,
            quantization=quantization,
            max_adapters=max_adapters,
            max_adapter_rank=16,
        )
        self.vocab_size = spec.vocab_size
        self.kv_shape = KVShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, self.model.dtype)
        self.attention = {
            window: TritonAttention(
                AttentionShape(
                    spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size, self.model.dtype, self.model.dtype,
                    spec.query_scale, self.max_model_len, window, spec.attention_softcap, batch_invariant,
                ),
                KIND,
                WHERE,
            )
            for window in self.model.windows()
        }  # fmt: skip

    def step(self, inputs: StepInputs, cache: KVCache) -> Logits:
        query_lens, contexts = (inputs.cu[1:] - inputs.cu[:-1]).tolist(), inputs.context_lens.tolist()
        step = StepTensors(
            _words(inputs.token_ids),
            _words(inputs.positions),
            _words(inputs.slot_mapping),
            Rows(_words(inputs.cu), _words(inputs.context_lens), _words(inputs.block_tables)),
            {window: attention.plan(query_lens, contexts) for window, attention in self.attention.items()},
            None if inputs.adapters is None else _words(np.repeat(inputs.adapters, query_lens)),
        )
        pages = cache.pages.to(WHERE)
        hidden = self.model.forward(step, pages, self.attention)
        cache.pages.copy_(pages)

        def logits(tokens: Ints) -> Tensor:
            out = torch.empty(len(tokens), self.vocab_size, device=WHERE)
            self.model.logits(hidden, torch.from_numpy(tokens).to(WHERE), out)
            return out.cpu()

        return logits


def _words(values: Ints | NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(values).to(torch.int32).to(WHERE)
