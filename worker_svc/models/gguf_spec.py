"""GGUF metadata → ModelSpec, for the architectures that llama.cpp names `llama`, `qwen2` and `qwen3`.

Source of the key and tensor names: the GGUF specification in ggml's docs. Only `llama` has its q and k rows permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker_svc.models.raw_tensor import Checkpoint
from worker_svc.models.rope import Rope
from worker_svc.models.spec import ModelSpec, SpecError, WeightNames

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_LAYER = {
    "attn_norm": "blk.{i}.attn_norm.{p}",
    "q": "blk.{i}.attn_q.{p}",
    "k": "blk.{i}.attn_k.{p}",
    "v": "blk.{i}.attn_v.{p}",
    "o": "blk.{i}.attn_output.{p}",
    "q_norm": "blk.{i}.attn_q_norm.{p}",
    "k_norm": "blk.{i}.attn_k_norm.{p}",
    "mlp_norm": "blk.{i}.ffn_norm.{p}",
    "gate": "blk.{i}.ffn_gate.{p}",
    "up": "blk.{i}.ffn_up.{p}",
    "down": "blk.{i}.ffn_down.{p}",
}
_TOP = {"embed": "token_embd.{p}", "final_norm": "output_norm.{p}", "lm_head": "output.{p}"}


def spec(checkpoint: Checkpoint) -> ModelSpec:
    """Raises SpecError naming the key that is missing or not supported."""
    metadata = checkpoint.metadata
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise SpecError(f"GGUF architecture {arch!r} is not supported, only {', '.join(ARCHITECTURES)}")
    if f"{arch}.expert_count" in metadata:
        raise SpecError("GGUF models with experts are not supported")
    hidden, heads = (_int(metadata, f"{arch}.{key}") for key in ("embedding_length", "attention.head_count"))
    max_len = _int(metadata, f"{arch}.context_length")
    head_dim = int(metadata.get(f"{arch}.attention.key_length", hidden // heads))
    if int(metadata.get(f"{arch}.attention.value_length", head_dim)) != head_dim:
        raise SpecError("GGUF models whose keys and values differ in length are not supported")
    return ModelSpec(
        architecture=f"gguf:{arch}",
        vocab_size=checkpoint.tensor("token_embd.weight").shape[0],
        hidden_size=hidden,
        intermediate_size=_int(metadata, f"{arch}.feed_forward_length"),
        num_layers=_int(metadata, f"{arch}.block_count"),
        num_heads=heads,
        num_kv_heads=int(metadata.get(f"{arch}.attention.head_count_kv", heads)),
        head_dim=head_dim,
        max_model_len=max_len,
        max_positions=max_len,
        norm_eps=_float32(metadata[f"{arch}.attention.layer_norm_rms_epsilon"]),
        rope=_rope(checkpoint, arch, head_dim, max_len),
        names=WeightNames(_LAYER, _TOP, interleaved_qk=arch == "llama"),
        qkv_bias="blk.0.attn_q.bias" in checkpoint,
        o_bias="blk.0.attn_output.bias" in checkpoint,
        mlp_bias="blk.0.ffn_up.bias" in checkpoint,
        qk_norm="blk.0.attn_q_norm.weight" in checkpoint,
        windows=(window,) * _int(metadata, f"{arch}.block_count")
        if (window := int(metadata.get(f"{arch}.attention.sliding_window", 0)))
        else (),
        tied="output.weight" not in checkpoint,
    )


def _rope(checkpoint: Checkpoint, arch: str, head_dim: int, max_len: int) -> Rope:
    metadata = checkpoint.metadata
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise SpecError(f"GGUF rope scaling {kind!r} is not supported, only none and linear")
    divisors = checkpoint.tensor("rope_freqs.weight").float32().tolist() if "rope_freqs.weight" in checkpoint else ()
    return Rope(
        dim=int(metadata.get(f"{arch}.rope.dimension_count", head_dim)),
        theta=float(metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        kind="linear" if kind == "linear" else "default",
        factor=float(metadata.get(f"{arch}.rope.scaling.factor", 1.0)),
        original_max_len=max_len,
        divisors=tuple(divisors),
    )


def _int(metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key)
    if not isinstance(value, int) or value < 1:
        raise SpecError(f"GGUF metadata: {key} must be a positive integer, not {value!r}")
    return value


def _float32(value: float) -> float:
    """The shortest decimal of a float32: 1e-5, not 9.99999974e-06, as the config it was made from had it."""
    return float(f"{value:.7g}")
