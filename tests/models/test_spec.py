"""What configs and GGUF headers say, read into a ModelSpec."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from protos.wire import Epoch, Setup
from tests.formats import builders
from worker_svc.backends.base import BackendError
from worker_svc.backends.torch import TorchBackend
from worker_svc.models.checkpoint import CheckpointError
from worker_svc.models.decoder import rope_of
from worker_svc.models.loader import open_model, split_halves, weights_digest
from worker_svc.models.registry import spec_of
from worker_svc.models.rope import Rope
from worker_svc.models.spec import SpecError

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "original_max_position_embeddings": 512,
        "short_factor": [1.0 + 0.1 * i for i in range(32)],
        "long_factor": [1.5 + 0.3 * i for i in range(32)],
    },
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("length", [256, 4096])
def test_frequencies_equal_those_of_transformers(name: str, length: int) -> None:
    scaling = {"rope_type": name, "rope_theta": 50000.0, **SCALED[name]}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=scaling)
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=length)
    rope = rope_of({"rope_parameters": scaling}, 64, 4096)
    np.testing.assert_allclose(rope.frequencies(length), frequencies.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(factor)


def test_the_older_spelling_of_rope_is_read() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    assert rope_of({"rope_theta": 7.0, "rope_scaling": scaling}, 8, 64) == rope_of(
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}}, 8, 64
    )


def test_the_older_spelling_wins_as_in_transformers() -> None:
    both = {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rope_theta": 7000.0,
    }
    theirs = LlamaConfig.from_dict(both).rope_parameters
    rope = rope_of(both, 8, 64)
    assert {"rope_type": rope.kind, "factor": rope.factor, "rope_theta": rope.theta} == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size must be a positive integer"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6' is not supported"),
        ({"rope_scaling": {"type": "xpos"}}, "rope type 'xpos' is not supported"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0}},
            "rope: low_freq_factor must be a number above 0",
        ),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of({**BASE, **change})


GGUF: dict[str, Any] = {
    "general.architecture": (builders.STRING, "llama"),
    "llama.embedding_length": (builders.U32, 64),
    "llama.attention.head_count": (builders.U32, 4),
    "llama.attention.head_count_kv": (builders.U32, 2),
    "llama.attention.layer_norm_rms_epsilon": (builders.F32, 1e-5),
    "llama.context_length": (builders.U32, 128),
    "llama.feed_forward_length": (builders.U32, 96),
    "llama.block_count": (builders.U32, 2),
}


def gguf(path: Path, pairs: dict[str, Any]) -> Path:
    file = path / "model.gguf"
    embedding = ("token_embd.weight", (3, 64), 0, bytes(3 * 64 * 4))
    file.write_bytes(builders.gguf([builders.pair(key, *value) for key, value in pairs.items()], [embedding]))
    return file


@pytest.mark.parametrize("key", list(GGUF))
@pytest.mark.parametrize("trouble", ["missing", "a list", "a string", "zero"])
def test_a_malformed_gguf_is_refused_by_key(tmp_path: Path, key: str, trouble: str) -> None:
    assert open_model(gguf(tmp_path, GGUF)) is not None
    troubles: dict[str, dict[str, Any]] = {
        "missing": {},
        "a list": {key: ((builders.ARRAY, builders.U32), [2, 2])},
        "a string": {key: (builders.STRING, "x")},
        "zero": {key: (builders.U32, 0)},
    }
    pairs = {**{k: v for k, v in GGUF.items() if k != key}, **troubles[trouble]}
    if (key, trouble) == ("llama.attention.head_count_kv", "missing"):
        assert open_model(gguf(tmp_path, pairs)) is not None
        return
    with pytest.raises(BackendError, match=r"^[^\n]*model.gguf: GGUF [^\n]*") as caught:
        TorchBackend(threads=1).load(Setup(Epoch(1, 1), str(gguf(tmp_path, pairs))), lambda what, share: None)
    assert key.rpartition(".")[2] in str(caught.value)


def test_kv_heads_that_do_not_divide_the_heads_of_a_gguf_are_refused(tmp_path: Path) -> None:
    file = gguf(tmp_path, {**GGUF, "llama.attention.head_count_kv": (builders.U32, 3)})
    with pytest.raises(SpecError, match=r"head_count_kv must be a divisor of the 4 heads, not 3"):
        open_model(file)


WRONG: tuple[Any, ...] = ("x", [], [1], {"a": 1}, True, -1, 0.5, float("nan"), 10**400)


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "dynamic", "longrope"])
def test_a_malformed_config_is_a_spec_error_and_nothing_else(family: str, kind: str, tmp_path: Path) -> None:
    """Every field with every wrong value. Some still mean something: those are followed."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, **SCALED[kind]}
    more = {"head_dim": 64, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    config = {**BASE, **more, "architectures": [family], "rms_norm_eps": 1e-6, "rope_parameters": rope}
    changes: list[dict[str, Any]] = [{key: wrong} for key in config for wrong in WRONG]
    changes += [{"rope_parameters": {**rope, key: wrong}} for key in rope for wrong in WRONG]
    refused = 0
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        try:
            model = open_model(tmp_path)
        except SpecError as error:
            refused += "\n" not in str(error)
        except CheckpointError:
            pass  # it was followed, and there are no weights to go on with
        else:
            assert model is None, "another architecture"
    assert refused > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": "x"}, "config.json: head_dim must be a positive integer, not 'x'"),
        ({"rms_norm_eps": "tiny"}, "config.json: rms_norm_eps must be a number above 0, not 'tiny'"),
        ({"rope_theta": [1]}, r"config.json, rope: rope_theta must be a number above 0, not \[1\]"),
        ({"rope_scaling": "linear"}, "config.json: rope_scaling must be an object, not 'linear'"),
        ({"architectures": "LlamaForCausalLM"}, "config.json: architectures must be a list of strings"),
        ({"partial_rotary_factor": 0.01}, "rope of 0 dimensions in heads of 16"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "config.json cannot be followed: Zero"),
    ],
)
def test_the_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **change}))
    with pytest.raises(BackendError, match=message):
        TorchBackend(threads=1).load(Setup(Epoch(1, 1), str(tmp_path)), lambda what, share: None)


def test_an_unknown_architecture_is_no_family() -> None:
    assert spec_of({**BASE, "architectures": ["BertModel"]}) is None


def test_windows_of_qwen() -> None:
    config = {**BASE, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1}
    off, on = spec_of(config), spec_of({**config, "use_sliding_window": True})
    assert off is not None
    assert on is not None
    assert (off.windows, on.windows) == ((), (0, 64))


def test_the_real_gguf_says_the_published_facts(model_path: Path) -> None:
    model = open_model(model_path)
    assert model is not None
    spec = model.spec
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads) == (576, 30, 9, 3)
    assert (spec.head_dim, spec.vocab_size, spec.max_model_len, spec.tied) == (64, 49152, 8192, True)
    assert (spec.norm_eps, spec.rope) == (1e-5, Rope(dim=64, theta=100000.0, original_max_len=8192))
    assert spec.names.interleaved_qk


def test_split_halves_undoes_ggufs_order() -> None:
    heads, half = 3, 4
    theirs = np.arange(heads * 2 * half * 5).reshape(heads * 2 * half, 5)
    interleaved = theirs.reshape(heads, 2, half, 5).swapaxes(1, 2).reshape(theirs.shape)
    assert np.array_equal(split_halves(interleaved, heads), theirs)
    assert not np.array_equal(interleaved, theirs)


def test_the_digest_tells_weights_apart(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    content = bytearray(np.random.default_rng(0).bytes(300_000))
    digests = set()
    for position in (0, 150_000, 299_999):
        content[position] ^= 1
        file.write_bytes(content)
        digests.add(weights_digest(file))
    file.write_bytes(content + b"x")
    assert len({*digests, weights_digest(file)}) == 4


def test_reading_a_model_needs_no_torch() -> None:
    code = "import sys; import worker_svc.models.loader, worker_svc.trial_step; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
