"""TorchBackend by its seam: plans in, results out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig

from protos.wire import Phase
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.session import Session, ids, load, setup
from tests.models.stepping import tokens
from worker_svc.backends.base import BackendError
from worker_svc.backends.torch import TorchBackend

BLOCK = 3 * 2 * 2 * 16 * 8 * 4  # bytes: layers, K and V, kv heads, head_dim, tokens, float32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("llama")
    return path, checkpoints.save(path, LlamaConfig(**SMALL))


def reference(model: Any, prompt: list[int], count: int) -> list[int]:
    known = list(prompt)
    for _ in range(count):
        known.append(int(checkpoints.logits(model, known)[-1].argmax()))
    return known[len(prompt) :]


def test_greedy_equals_transformers_however_it_is_planned(llama: tuple[Path, Any]) -> None:
    path, theirs = llama
    session, prompt = Session(setup(path)), tokens(45, 151)
    expected = reference(theirs, prompt, 20)
    results = session.greedy(prompt, 20)
    assert ids(results) == expected
    assert [result.start for result in results] == list(range(45, 65))
    assert ids(session.greedy(prompt, 20, slot=3, chunk=7)) == expected
    session.backend.reset(session.setup)
    assert ids(session.greedy(prompt, 20)) == expected


def test_a_stream_readmitted_with_its_tokens_goes_on(llama: tuple[Path, Any]) -> None:
    session, prompt = Session(setup(llama[0])), tokens(30, 151, seed=5)
    whole = ids(session.greedy(prompt, 16, seed=9, temperature=1.0))
    again = ids(Session(setup(llama[0])).greedy(prompt + whole[:6], 10, seed=9, temperature=1.0))
    assert whole == whole[:6] + again


def test_prompt_logprobs_are_those_of_transformers(llama: tuple[Path, Any]) -> None:
    path, theirs = llama
    prompt = tokens(150, 151, seed=2)
    results = Session(setup(path)).greedy(prompt, 1, chunk=100, prompt_logprobs=2, logprobs=1)
    scores = [score for result in results for score in result.prompt_logprobs]
    expected = torch.log_softmax(checkpoints.logits(theirs, prompt), -1)
    assert [score.token_id for score in scores] == prompt[1:]
    for position, score in enumerate(scores):
        row = expected[position]
        assert score.logprob == pytest.approx(float(row[score.token_id]), abs=1e-4)
        assert score.rank == int((row > row[score.token_id]).sum()) + 1
        assert list(score.top_logprobs) == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert results[-1].logprobs[0].logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)


def test_capacity_says_what_was_loaded(llama: tuple[Path, Any]) -> None:
    exact, other = Session(setup(llama[0])).capacity, Session(setup(llama[0], dtype="bfloat16")).capacity
    assert (exact.exact, exact.dtype, exact.backend, exact.align) == (True, "float32", "torch", 1)
    assert (other.exact, other.dtype) == (False, "bfloat16")
    assert (exact.vocab_size, exact.max_model_len) == (151, 512)
    assert exact.num_blocks == (1 << 20) // BLOCK
    assert other.num_blocks == (1 << 20) // (BLOCK // 2)
    assert exact.fingerprint != other.fingerprint
    assert exact.fingerprint == Session(setup(llama[0])).capacity.fingerprint


def test_the_fingerprint_tells_arithmetics_apart(llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 and 16 tokens fill tiles of the same length, blocks of 48 do not."""
    plain, same, other = (Session(setup(llama[0], block_size=size)).capacity.fingerprint for size in (8, 16, 48))
    assert plain == same
    assert plain != other
    monkeypatch.setattr("worker_svc.backends.torch.ARITHMETIC", -1)
    assert Session(setup(llama[0])).capacity.fingerprint != plain


def test_progress_tells_loading_from_warming_up(llama: tuple[Path, Any]) -> None:
    said: list[tuple[Phase, float]] = []
    TorchBackend(threads=1).load(setup(llama[0]), lambda phase, share: said.append((phase, share)))
    assert [phase for phase, _ in said] == [Phase.LOADING] * 3 + [Phase.COMPILING]
    assert [share for _, share in said] == [0.25, 0.5, 0.75, 0.0]


def test_the_context_is_cut_to_the_memory(llama: tuple[Path, Any]) -> None:
    assert Session(setup(llama[0], kv_bytes=10 * BLOCK)).capacity.max_model_len == 9 * 8
    with pytest.raises(BackendError, match="max_model_len 73 is more than the 72 tokens"):
        Session(setup(llama[0], kv_bytes=10 * BLOCK, max_model_len=73))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is not supported"),
        ({"quantization": "awq"}, "quantization 'awq' is not supported"),
        ({"kv_dtype": "fp8"}, "kv_dtype 'fp8' is not supported"),
        ({"speculation": "magic"}, "speculation 'magic' is not supported"),
        ({"speculation": "ngram"}, "num_drafts 0: must be at least 1"),
        ({"speculation": "draft", "num_drafts": 1}, "speculation 'draft' needs a draft_model"),
        ({"revision": "main"}, "revision 'main' is not supported"),
        ({"tp_size": 2}, "tp_size 2 needs a tp_address"),
        ({"tp_size": 2, "tp_rank": 2, "tp_address": "/nowhere"}, r"tp_rank 2 is not in 0\.\.1"),
        ({"tp_rank": -1}, r"tp_rank -1 is not in 0\.\.0"),
        ({"tp_size": 0}, r"tp_rank 0 is not in 0\.\.-1"),
        ({"kv_host_bytes": 3}, "kv_host_bytes 3 must hold a block"),
        ({"kv_host_bytes": 1 << 60}, "kv_host_bytes 1152921504606846976 and the first tier's"),
        ({"block_size": 0}, "block_size 0 must be at least 1"),
        ({"kv_bytes": 100}, "kv_bytes 100 must hold two blocks"),
        ({"kv_bytes": 1 << 60}, "more than this machine's memory"),
        ({"max_model_len": 513}, "max_model_len 513 is over the model's 512"),
        ({"model": "/nowhere"}, "no config.json"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    llama: tuple[Path, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        load(TorchBackend(threads=1), setup(llama[0], **fields))


def test_another_device_is_refused() -> None:
    with pytest.raises(BackendError, match="device 'cuda'"):
        TorchBackend("cuda")


def test_weights_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 113}))
    with pytest.raises(BackendError, match=r"gate_proj.* has shape \[112, 64\], the config implies \[113, 64\]"):
        load(TorchBackend(threads=1), setup(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(BackendError, match=r"layers\.3\."):
        load(TorchBackend(threads=1), setup(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(BackendError, match="quant_method '' is not supported, only gptq"):
        load(TorchBackend(threads=1), setup(tmp_path))


def test_other_models_go_through_transformers(tmp_path: Path, llama: tuple[Path, Any]) -> None:
    theirs = checkpoints.save(tmp_path, GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}))
    session, prompt = Session(setup(tmp_path)), tokens(33, 151)
    assert (session.capacity.backend, session.capacity.exact) == ("transformers", False)
    assert ids(session.greedy(prompt, 10, chunk=9)) == reference(theirs, prompt, 10)
    forced = Session(setup(llama[0]), transformers=True)
    assert forced.capacity.backend == "transformers"
    assert ids(forced.greedy(prompt, 10, chunk=9, prompt_logprobs=0)) == reference(llama[1], prompt, 10)
