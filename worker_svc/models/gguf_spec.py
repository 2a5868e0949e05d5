"""GGUF metadata → ModelSpec, for the architectures that llama.cpp names `llama`, `qwen2` and `qwen3`.

Source of the key and tensor names: the GGUF specification in ggml's docs. Only `llama` has its q and k rows permuted.
"""

from __future__ import annotations

from worker_svc.models.fields import MAX_HEAD_DIM, MAX_LAYERS, Fields
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
    metadata = Fields("GGUF metadata", checkpoint.metadata)
    arch = metadata.text("general.architecture", "")
    if arch not in ARCHITECTURES:
        raise SpecError(f"GGUF architecture {arch!r} is not supported, only {', '.join(ARCHITECTURES)}")
    if metadata.whole(f"{arch}.expert_count", 0, least=0):
        raise SpecError("GGUF models with experts are not supported")
    hidden, heads = (metadata.whole(f"{arch}.{key}") for key in ("embedding_length", "attention.head_count"))
    kv_heads = metadata.whole(f"{arch}.attention.head_count_kv", heads)
    if heads % kv_heads:
        raise metadata.trouble(f"{arch}.attention.head_count_kv", f"a divisor of the {heads} heads", kv_heads)
    max_len, layers = metadata.whole(f"{arch}.context_length"), metadata.whole(f"{arch}.block_count", most=MAX_LAYERS)
    window = metadata.whole(f"{arch}.attention.sliding_window", 0, least=0)
    head_dim = metadata.whole(f"{arch}.attention.key_length", hidden // heads, most=MAX_HEAD_DIM)
    if metadata.whole(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise SpecError("GGUF models whose keys and values differ in length are not supported")
    return ModelSpec(
        architecture=f"gguf:{arch}",
        vocab_size=checkpoint.tensor("token_embd.weight").shape[0],
        hidden_size=hidden,
        intermediate_size=metadata.whole(f"{arch}.feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=max_len,
        max_positions=max_len,
        norm_eps=_float32(metadata.number(f"{arch}.attention.layer_norm_rms_epsilon")),
        rope=_rope(checkpoint, metadata, arch, head_dim, max_len),
        names=WeightNames(_LAYER, _TOP, interleaved_qk=arch == "llama"),
        qkv_bias="blk.0.attn_q.bias" in checkpoint,
        o_bias="blk.0.attn_output.bias" in checkpoint,
        mlp_bias="blk.0.ffn_up.bias" in checkpoint,
        qk_norm="blk.0.attn_q_norm.weight" in checkpoint,
        windows=(window,) * layers if window else (),
        tied="output.weight" not in checkpoint,
    )


def _rope(checkpoint: Checkpoint, metadata: Fields, arch: str, head_dim: int, max_len: int) -> Rope:
    kind = metadata.text(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise SpecError(f"GGUF rope scaling {kind!r} is not supported, only none and linear")
    divisors = checkpoint.tensor("rope_freqs.weight").float32().tolist() if "rope_freqs.weight" in checkpoint else ()
    return Rope(
        dim=metadata.whole(f"{arch}.rope.dimension_count", head_dim),
        theta=metadata.number(f"{arch}.rope.freq_base", 10000.0),
        kind="linear" if kind == "linear" else "default",
        factor=metadata.number(f"{arch}.rope.scaling.factor", 1.0),
        original_max_len=max_len,
        divisors=tuple(divisors),
    )


def _float32(value: float) -> float:
    """The shortest decimal of a float32: 1e-5, not 9.99999974e-06, as the config it was made from had it."""
    return float(f"{value:.7g}")
