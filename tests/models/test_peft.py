"""PEFT's files: what is read of them, and what is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.random_adapter import ALL, write
from protos.adapter_files import CONFIG, WEIGHTS, digest
from tests.models.checkpoints import SMALL
from worker_svc.adapters.peft import read_adapter
from worker_svc.adapters.places import AdapterError
from worker_svc.models import registry
from worker_svc.models.spec import ModelSpec

LAYER = "base_model.model.model.layers.1."


def spec_of(architecture: str, **fields: Any) -> ModelSpec:
    spec = registry.spec_of({**SMALL, **fields, "architectures": [architecture]})
    assert spec is not None
    return spec


LLAMA = spec_of("LlamaForCausalLM")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter", LLAMA, 4, seed=1)


def say(path: Path, **fields: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **fields}))


def tensors(path: Path, **changes: Any) -> None:
    """Replaces some; None takes one away."""
    every = {**load_file(path / WEIGHTS), **changes}
    save_file({name: array for name, array in every.items() if array is not None}, path / WEIGHTS)


def test_every_role_of_every_layer(path: Path) -> None:
    adapter = read_adapter(path, LLAMA, 16, digest(path))
    stored = load_file(path / WEIGHTS)
    assert adapter.rank == 4
    for i, layer in enumerate(adapter.layers):
        assert set(layer) == {"q", "k", "v", "o", "gate", "up", "down"}
        for module in ALL:
            lora = layer[module.partition(".")[2].removesuffix("_proj")]
            for side, array in (("A", lora.a), ("B", lora.b)):
                assert np.array_equal(array, stored[f"base_model.model.model.layers.{i}.{module}.lora_{side}.weight"])
            assert lora.scale == 2.0


def test_patterns_and_scales(path: Path) -> None:
    """The first pattern that is a module's end counts, as a regular expression."""
    wide = {f"{LAYER}mlp.down_proj.lora_A.weight": np.ones((6, 112), np.float32)}
    wide[f"{LAYER}mlp.down_proj.lora_B.weight"] = np.ones((64, 6), np.float32)
    tensors(path, **wide)
    say(path, lora_alpha=3.0, use_rslora=True, rank_pattern={r"layers\.1\.mlp\.down_proj": 6})
    say(path, alpha_pattern={"q_proj": 10, "model.layers.0.self_attn.q_proj": 99})
    adapter = read_adapter(path, LLAMA, 6)
    assert adapter.rank == 6
    assert adapter.layers[1]["down"].scale == pytest.approx(3 / 6**0.5)
    assert adapter.layers[0]["down"].scale == pytest.approx(3 / 4**0.5)
    assert adapter.layers[0]["q"].scale == pytest.approx(10 / 4**0.5)


def test_fused_modules_share_their_a(tmp_path: Path) -> None:
    spec = spec_of("Phi3ForCausalLM")
    path = write(tmp_path, LLAMA, 4, seed=1, modules=("self_attn.o_proj",))
    rng = np.random.default_rng(0)
    shapes = {"self_attn.qkv_proj": (128, 64), "mlp.gate_up_proj": (224, 64)}
    made = {
        f"{LAYER}{module}.lora_{side}.weight": rng.standard_normal(shape).astype(np.float32)
        for module, (rows, columns) in shapes.items()
        for side, shape in (("A", (4, columns)), ("B", (rows, 4)))
    }
    tensors(path, **made)
    layer = read_adapter(path, spec, 16).layers[1]
    for module, roles in (("self_attn.qkv_proj", "q k v"), ("mlp.gate_up_proj", "gate up")):
        parts = [layer[role] for role in roles.split()]
        whole = made[f"{LAYER}{module}.lora_B.weight"]
        assert np.array_equal(np.concatenate([part.b for part in parts]), whole)
        assert all(np.array_equal(part.a, made[f"{LAYER}{module}.lora_A.weight"]) for part in parts)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type must be 'LORA', not 'LOHA'"),
    ({"use_dora": True}, "use_dora is not supported, and must not be set"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
    ({"bias": "all"}, "bias must be 'none'"),
    ({"lora_bias": True}, "lora_bias is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights must be one of True, .*, not 'pissa_niter_16'"),
    ({"something_new": 3}, r"something_new is not supported, and must not be set \(it is 3\)"),
    ({"r": 0}, "r must be a positive integer, not 0"),
    ({"r": 8}, r"lora_A.weight' has shape \[4, .*imply \[8, "),
    ({"r": 17}, "is of rank 17, over max_adapter_rank 16"),
    ({"rank_pattern": {"q_proj(": 4}}, "is no regular expression"),
    ({"lora_alpha": None}, "lora_alpha must be a number above 0, not None"),
]


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_fields_that_are_refused(path: Path, fields: dict[str, Any], reason: str) -> None:
    say(path, **fields)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(path, LLAMA, 16)


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"base_model.model.lm_head.lora_A.weight": zeros(4, 64)}, "tensor '.*lm_head.lora_B.weight' is missing"),
    ({f"base_model.model.lm_head.lora_{s}.weight": zeros(4, 4) for s in "AB"}, "adapts lm_head; only self_attn.q_proj"),
    ({"base_model.model.model.embed_tokens.lora_embedding_A": zeros(4, 9)}, "embedding_A' is none of LoRA"),
    ({f"{LAYER}mlp.up_proj.lora_B.weight": None}, "up_proj.lora_B.weight' is missing"),
    ({f"{LAYER}mlp.up_proj.lora_B.weight": zeros(111, 4)}, r"shape \[111, 4\]; .* imply \[112, 4\]: is it"),
    ({f"{LAYER.replace('1', '7')}mlp.up_proj.lora_{s}.weight": zeros(4, 4) for s in "AB"}, "of layer 7, and .* 3"),
    ({f"{LAYER}mlp.gate_up_proj.lora_A.weight": zeros(4, 64), f"{LAYER}mlp.gate_up_proj.lora_B.weight": zeros(224, 4)},
     "another tensor of layer 1 adapts as well"),
    ({f"{LAYER}mlp.up_proj.lora_A.weight": zeros(4, 64) * np.nan}, "not finite numbers"),
    ({f"{LAYER}mlp.up_proj.lora_A.weight": zeros(4, 64).astype(np.int8)}, "cannot be read as weights"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_tensors_that_are_refused(path: Path, changes: dict[str, Any], reason: str) -> None:
    tensors(path, **changes)
    with pytest.raises(AdapterError, match=reason):
        read_adapter(path, LLAMA, 16)


def test_mlps_of_experts_are_not_adapted(path: Path) -> None:
    spec = spec_of("Qwen3MoeForCausalLM", head_dim=16, num_experts=4, moe_intermediate_size=48, num_experts_per_tok=2)
    with pytest.raises(AdapterError, match="adapts the MLP of layer 0, which has experts"):
        read_adapter(path, spec, 16)


def test_files_that_are_none_or_others(path: Path) -> None:
    with pytest.raises(AdapterError, match="its files are not those"):
        read_adapter(path, LLAMA, 16, "0" * 32)
    (path / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config.json is not JSON"):
        read_adapter(path, LLAMA, 16)
    (path / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: No such file"):
        read_adapter(path, LLAMA, 16, "0" * 32)
