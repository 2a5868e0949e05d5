"""Each family against transformers: logits at every position, whole, in odd chunks, over a cache, and batched."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.stepping import Sequence, continue_in, cuts, run, tokens
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner
from worker_svc.models.loader import DType, open_model

FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.2 * i for i in range(8)]}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **fields}}


SLIDING: dict[str, Any] = {
    "sliding_window": 37,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LOCAL_GLOBAL: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MOE = {**SMALL, "head_dim": 16, "num_experts": 5, "moe_intermediate_size": 48, "num_experts_per_tok": 2}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, rms_norm_eps=1e-5),
    "llama-tied-biases": LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-mha-96": LlamaConfig(**{**SMALL, "num_key_value_heads": 4}, head_dim=96),
    "llama-mqa-128": LlamaConfig(**{**SMALL, "num_key_value_heads": 1}, head_dim=128),
    "llama-odd": LlamaConfig(
        **{**SMALL, "vocab_size": 97, "hidden_size": 54, "intermediate_size": 77, "num_attention_heads": 6}
        | {"num_key_value_heads": 3},
        head_dim=10,
    ),
    "llama-gelu": LlamaConfig(**SMALL, hidden_act="gelu_pytorch_tanh"),
    "llama-linear": LlamaConfig(**SMALL, **rope("linear", factor=2.5)),
    "llama-dynamic": LlamaConfig(**SMALL, **rope("dynamic", factor=2.0)),
    "llama-llama3": LlamaConfig(
        **SMALL,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": LlamaConfig(**SMALL, **rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-longrope": LlamaConfig(
        **SMALL, **rope("longrope", factor=1.5, original_max_position_embeddings=512, **FACTORS)
    ),
    "mistral": MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "mistral-window": MistralConfig(**SMALL, sliding_window=37),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-windows": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=19, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen3-windows-biases": Qwen3Config(
        **SMALL, head_dim=24, attention_bias=True, use_sliding_window=True, sliding_window=33, max_window_layers=2
    ),
    "gemma2": Gemma2Config(**SMALL, head_dim=32, sliding_window=37, query_pre_attn_scalar=24, pad_token_id=0),
    "gemma2-capped-biases": Gemma2Config(
        **SMALL,
        head_dim=16,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
        attention_bias=True,
        pad_token_id=0,
    ),
    "gemma3": Gemma3TextConfig(
        **SMALL, head_dim=16, query_pre_attn_scalar=24, pad_token_id=0, **SLIDING, rope_parameters=LOCAL_GLOBAL
    ),
    "phi3": Phi3Config(**SMALL, pad_token_id=0, sliding_window=37),
    "phi3-partial-longrope": Phi3Config(
        **{**SMALL, "hidden_size": 128},
        pad_token_id=0,
        tie_word_embeddings=True,
        original_max_position_embeddings=512,
        **rope("longrope", partial_rotary_factor=0.5, factor=1.5, **FACTORS),
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, sliding_window=37),
    "mixtral-all": MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=3),
    "qwen3moe": Qwen3MoeConfig(**MOE, norm_topk_prob=True, use_sliding_window=True, sliding_window=33),
    "qwen3moe-some-layers": Qwen3MoeConfig(**MOE, mlp_only_layers=[1], tie_word_embeddings=True, attention_bias=True),
    "qwen3moe-every-other": Qwen3MoeConfig(**MOE, decoder_sparse_step=2),
}


def open_runner(path: Path, dtype: DType = "float32") -> ModelRunner:
    model = open_model(path)
    assert model is not None
    return ModelRunner(model, dtype, model.spec.max_model_len, lambda share: None)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = checkpoints.save(tmp_path, CONFIGS[name])
    runner = open_runner(tmp_path)
    prompts = [tokens(n, runner.vocab_size, seed=n) for n in (203, 60, 1, 131)]
    expected = [checkpoints.logits(theirs, prompt) for prompt in prompts]

    whole = run(runner, [Sequence(prompts[0], [len(prompts[0])])])
    torch.testing.assert_close(whole[0], expected[0], atol=2e-4, rtol=1e-4)

    batched = run(runner, [Sequence(prompt, cuts(len(prompt), seed=i)) for i, prompt in enumerate(prompts)])
    for ours, right in zip(batched, expected, strict=True):
        torch.testing.assert_close(ours, right, atol=2e-4, rtol=1e-4)


def test_a_cached_prefix_is_read_from_its_blocks(tmp_path: Path) -> None:
    """Two sequences share the blocks of one prefix, as the prefix cache has it."""
    theirs = checkpoints.save(tmp_path, CONFIGS["llama"])
    runner = open_runner(tmp_path)
    prefix = tokens(64, runner.vocab_size)
    cache = KVCache(runner.kv_shape, 40, 8)
    rng = random.Random(0)
    continue_in(runner, cache, [Sequence(prefix, [64], blocks=[3, 1, 4, 15, 9, 2, 6, 5])], rng)
    ends = [prefix + tokens(n, runner.vocab_size, seed=n) for n in (31, 12)]
    shared = [3, 1, 4, 15, 9, 2, 6, 5]
    sequences = [
        Sequence(ends[0], cuts(95, 1, start=64), cached=64, blocks=[*shared, 20, 21, 22, 23]),
        Sequence(ends[1], [76], cached=64, blocks=[*shared, 30, 31]),
    ]
    for ours, whole in zip(continue_in(runner, cache, sequences, rng), ends, strict=True):
        torch.testing.assert_close(ours, checkpoints.logits(theirs, whole)[64:], atol=2e-4, rtol=1e-4)


def test_a_sharded_checkpoint_reads_the_same(tmp_path: Path) -> None:
    for name, shard in (("one", "5GB"), ("many", "100KB")):
        checkpoints.save(tmp_path / name, CONFIGS["qwen2"], shard)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    prompt = tokens(50, 151)
    one, many = (run(open_runner(tmp_path / name), [Sequence(prompt, [50])])[0] for name in ("one", "many"))
    assert torch.equal(one, many)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3"])
def test_bfloat16_stays_near(name: str, tmp_path: Path) -> None:
    theirs = checkpoints.save(tmp_path, CONFIGS[name])
    prompts = [tokens(n, 151, seed=n) for n in (120, 33)]
    ours = run(open_runner(tmp_path, "bfloat16"), [Sequence(p, cuts(len(p), seed=3)) for p in prompts])
    for logits, prompt in zip(ours, prompts, strict=True):
        expected = checkpoints.logits(theirs, prompt)
        assert (logits - expected).abs().mean() < 0.03 * expected.std()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_longer_context_settles_the_rope_at_load(kind: str, tmp_path: Path) -> None:
    """Past the context trained on, transformers turns by the sequence's length; ours by the longest that is served."""
    fields = {"original_max_position_embeddings": 256, **FACTORS} if kind == "longrope" else {}
    theirs = checkpoints.save(tmp_path, LlamaConfig(**SMALL, **rope(kind, factor=2.0, **fields)))
    model = open_model(tmp_path)
    assert model is not None
    length = model.spec.max_positions
    assert length == (512 if kind == "longrope" else 1024)
    runner = ModelRunner(model, "float32", length, lambda share: None)
    prompt = tokens(length, 151)
    ours = run(runner, [Sequence(prompt, [200, 201, length])])[0]
    torch.testing.assert_close(ours, checkpoints.logits(theirs, prompt), atol=5e-4, rtol=1e-4)
