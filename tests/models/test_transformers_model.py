"""Models that are no family of ours, by transformers over our pages; what cannot be paged is refused, and why."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
)

from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.stepping import Sequence, cuts, run, tokens
from worker_svc.models.loader import open_model
from worker_svc.models.spec import SpecError
from worker_svc.models.transformers_model import TransformersRunner

PLAIN = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, PretrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "opt": OPTConfig(
        vocab_size=151, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
    "phi": PhiConfig(
        **SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    # Ours as well, but no other has both windows and softcaps for transformers to hand over.
    "gemma2": Gemma2Config(**SMALL, head_dim=16, sliding_window=21, attn_logit_softcapping=5.0),
    "qwen2_moe": Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers_itself(name: str, tmp_path: Path) -> None:
    theirs = checkpoints.save(tmp_path, CONFIGS[name])
    assert (open_model(tmp_path) is None) == (name != "gemma2")
    with torch.no_grad():
        runner = TransformersRunner(tmp_path, "float32", 0)
        prompts = [tokens(n, 151, seed=n) for n in (90, 40, 1)]
        got = run(runner, [Sequence(prompt, cuts(len(prompt), seed=i)) for i, prompt in enumerate(prompts)])
    for ours, prompt in zip(got, prompts, strict=True):
        torch.testing.assert_close(ours, checkpoints.logits(theirs, prompt), atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4),
            "layers of type linear_attention cannot be paged",
        ),
        (BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=2), "attention in transformers is of its own"),
    ],
)
def test_what_cannot_be_paged_is_refused(config: PretrainedConfig, reason: str, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, config)
    with pytest.raises(SpecError, match=reason):
        TransformersRunner(tmp_path, "float32", 0)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = checkpoints.save(tmp_path, CONFIGS["gpt_neox"])
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SpecError, match="safetensors"):
        TransformersRunner(tmp_path, "float32", 0)


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """Neither for a config that names it nor for a model: not even asked for is it."""
    checkpoints.save(tmp_path, CONFIGS["gpt_neox"])
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import GPTNeoXConfig as C, GPTNeoXForCausalLM as M\n"
    (tmp_path / "code.py").write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    named = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    for change in ({"auto_map": named}, {"auto_map": named, "model_type": "stranger"}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with contextlib.suppress(SpecError):  # the first is known to transformers itself
            TransformersRunner(tmp_path, "float32", 0)
        assert not ran.exists()


def test_a_rope_by_length_is_served_as_far_as_it_stays(tmp_path: Path) -> None:
    factors = [1.0 + 0.1 * i for i in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    rope |= {"original_max_position_embeddings": 128}
    checkpoints.save(tmp_path, LlamaConfig(**SMALL, rope_parameters=rope))
    with torch.no_grad():
        assert TransformersRunner(tmp_path, "float32", 0).max_model_len == 128
        with pytest.raises(SpecError, match="max_model_len 200 is over the 128"):
            TransformersRunner(tmp_path, "float32", 200)
