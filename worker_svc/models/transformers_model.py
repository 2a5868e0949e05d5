"""Any other causal LM that transformers knows, at its own speed, over our pages.

transformers runs everything but attention, on one flat row of a step's tokens with their positions; its attention
interface hands us q, k and v of each layer. Only models whose tokens meet nowhere else can be paged so: what a model's
config or a trial run says against that is refused. This is the only file that imports transformers.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker_svc.attention import cpu as attention
from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache, KVShape
from worker_svc.models.fields import described_by
from worker_svc.models.loader import DType
from worker_svc.models.spec import SpecError
from worker_svc.trial_step import TrialRow, trial_step

_NAME = "pagewire"
_TRIAL = 24  # tokens
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass
class _Step:
    """What our attention needs to know of the step that transformers is running."""

    inputs: StepInputs
    cache: KVCache | None  # None: only look at the shapes
    kv_rows: Tensor | None = None
    layouts: dict[int, attention.Layout] = field(default_factory=dict)
    seen: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # layer: kv heads, head_dim, window


# transformers calls attention by a registered name, and not every model hands keyword arguments through to it: the step
# in progress is a module variable. A worker runs one step at a time.
_step: _Step | None = None


@dataclass(frozen=True)
class StepOutputs:
    """Of those tokens of a step that were wanted, in ascending order."""

    tokens: Ints
    logits: Tensor  # [len(tokens), vocab] float32
    all_states: Tensor | None = None  # [T, hidden], where any are wanted

    def __call__(self, tokens: Ints) -> Tensor:
        """Logits [S, vocab] float32."""
        return self.logits[torch.from_numpy(np.searchsorted(self.tokens, tokens))]

    def states(self, tokens: Ints) -> Tensor:
        """After the final norm [S, hidden] float32."""
        assert self.all_states is not None, "the step pools nothing"
        return self.all_states[torch.from_numpy(tokens)].float()


class TransformersRunner:
    """Raises SpecError for a model that cannot be paged, saying why."""

    def __init__(self, path: Path, dtype: DType, max_model_len: int) -> None:
        """Reads safetensors only, from `path` only, and never code. `max_model_len` 0: the model's own."""
        self.dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        self._model = _load(path, self.dtype)
        with described_by("config.json"):
            config = self._model.config.get_text_config()
            self.max_model_len = _max_len(config, max_model_len)
            self.vocab_size, self.hidden_size = int(config.vocab_size), int(config.hidden_size)
            self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
            self.kv_shape = self._look(config)
            self._try_out()

    def step(self, inputs: StepInputs, cache: KVCache) -> StepOutputs:
        """Writes the step's K and V; answers about the tokens that it samples from, scores or pools."""
        wanted = np.unique(np.concatenate([inputs.sample_tokens, inputs.prompt_logprob_tokens]))
        rows = cache.rows_of(torch.from_numpy(inputs.slot_mapping))
        return self._run(_Step(inputs, cache, rows), wanted, pools=len(inputs.pooled_tokens) > 0)

    def _run(self, step: _Step, wanted: Ints, pools: bool = False) -> StepOutputs:
        global _step
        keep = {"logits_to_keep": torch.from_numpy(wanted)} if self._keeps else {}
        _step = step
        try:
            out = self._model(
                input_ids=torch.from_numpy(step.inputs.token_ids)[None],
                position_ids=torch.from_numpy(step.inputs.positions)[None],
                use_cache=False,
                output_hidden_states=pools,
                **keep,
            )
        finally:
            _step = None
        logits = out.logits[0] if self._keeps else out.logits[0][torch.from_numpy(wanted)]
        return StepOutputs(wanted, logits.float(), out.hidden_states[-1][0] if pools else None)

    def _look(self, config: Any) -> KVShape:
        """Runs one token to see which layers attend, and how wide."""
        inputs = trial_step([TrialRow(np.zeros(1, np.int64), 0, np.ones(1, np.int64))], block_size=1)
        step = _Step(inputs, None)
        self._run(step, np.zeros(1, np.int64))
        layers = int(config.num_hidden_layers)
        if sorted(step.seen) != list(range(layers)):
            raise SpecError(f"{len(step.seen)} of its {layers} layers are paged attention; the others cannot be paged")
        shapes = {(heads, dim) for heads, dim, _ in step.seen.values()}
        if len(shapes) > 1:
            raise SpecError(f"its layers differ in KV heads or head_dim: {sorted(shapes)}")
        windows = [window for _, _, window in step.seen.values()]
        kinds = getattr(config, "layer_types", None) or []
        if any(kind == "sliding_attention" and not window for kind, window in zip(kinds, windows, strict=False)):
            raise SpecError("it has sliding windows of which its attention layers do not tell the size")
        (heads, dim) = shapes.pop()
        return KVShape(layers, heads, dim, self.dtype)

    def _try_out(self) -> None:
        """The same tokens through transformers' own attention, and through ours in pieces beside another row."""
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, min(_TRIAL, self.max_model_len))
        self._model.set_attn_implementation("eager")
        expected = self._model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].float()
        self._model.set_attn_implementation(_NAME)
        size = 8
        cache = KVCache(self.kv_shape, num_blocks=9, block_size=size)
        blocks, others = np.arange(4, 0, -1), np.arange(5, 9)
        got, start = [], 0
        for end in (*range(len(tokens) // 2, len(tokens)), len(tokens)):
            if end > start:
                inputs = trial_step([TrialRow(tokens[:1], 0, others), TrialRow(tokens[:end], start, blocks)], size)
                step = _Step(inputs, cache, cache.rows_of(torch.from_numpy(inputs.slot_mapping)))
                got.append(self._run(step, np.arange(1, len(inputs.token_ids))).logits)
            start = end
        error = (torch.cat(got) - expected).abs().mean() / expected.std()
        if not error < 0.05:
            raise SpecError(
                "run in pieces it computes something else: it keeps more of a sequence than keys and values"
            )


def _load(path: Path, dtype: torch.dtype) -> Any:
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    AttentionInterface.register(_NAME, _attend)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise SpecError("transformers would run it, and quantized checkpoints are for families of ours alone")
        kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
        if not kinds <= _KNOWN_LAYERS:
            raise SpecError(f"its layers of type {', '.join(sorted(kinds - _KNOWN_LAYERS))} cannot be paged")
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        if model._is_stateful:
            raise SpecError("it carries a state from token to token, which cannot be paged")
        if not model._supports_attention_backend:
            raise SpecError("its attention in transformers is of its own making, not behind the attention interface")
        model.set_attn_implementation(_NAME)
    except SpecError:
        raise
    except Exception as error:  # its classes check their configs each in its own way, with errors of their own kinds
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"transformers cannot load it: {type(error).__name__}: {reason}") from error
    return model  # from_pretrained leaves it in eval mode


def _max_len(config: Any, asked: int) -> int:
    """A rope that depends on the sequence's length can be paged only as far as it stays as it is."""
    own = int(getattr(config, "max_position_embeddings", 0) or asked or 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        own = int(rope.get("original_max_position_embeddings") or own)
    if asked > own:
        raise SpecError(f"max_model_len {asked} is over the {own} that it serves")
    return asked or own


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, heads, T, dim], key and value [1, kv heads, T, dim] → [1, T, heads, dim]."""
    step = _step
    assert step is not None, "attention outside of a step"
    _, heads, num_tokens, dim = query.shape
    window, layer = int(sliding_window or 0), int(module.layer_idx)
    if step.cache is None or step.kv_rows is None:
        _refuse(module, key, value, attention_mask, extra)
        step.seen[layer] = (key.shape[1], dim, window)
        return query.transpose(1, 2), None
    step.cache.write(layer, step.kv_rows, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if window not in step.layouts:
        step.layouts[window] = attention.lay_out(step.inputs, step.cache, window)
    scale = dim**-0.5 if scaling is None else scaling
    q = query[0].transpose(0, 1).float()
    out = attention.attend(q, step.layouts[window], step.cache, layer, scale, softcap or 0.0)
    return out.view(1, num_tokens, heads, dim).to(query.dtype), None


def _refuse(module: Any, key: Tensor, value: Tensor, mask: Tensor | None, extra: dict[str, Any]) -> None:
    """What an attention layer asks for beyond causal attention over keys and values of one width."""
    if key.shape != value.shape:
        raise SpecError(f"its keys and values differ in width: {key.shape[-1]} and {value.shape[-1]}")
    if mask is not None:
        raise SpecError("it brings an attention mask of its own")
    if not getattr(module, "is_causal", True) or extra.get("is_causal") is False:
        raise SpecError("its attention is not causal")
    if strange := [name for name in ("s_aux", "position_bias", "indices") if extra.get(name) is not None]:
        raise SpecError(f"its attention needs {', '.join(strange)}")
