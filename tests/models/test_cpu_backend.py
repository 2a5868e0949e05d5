"""CpuBackend by its seam: plans in, results out; and when it is taken, or torch instead."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config

from kernels.cpu import library
from protos.wire import Admit, Mask, Phase, Row, Sampling, Setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.session import EPOCH, Session, ids, load
from tests.models.session import setup as plain_setup
from tests.models.stepping import tokens
from worker_svc import backends
from worker_svc.backends import base, cpu
from worker_svc.backends.base import BackendError, DeviceBackend, Options, Unsuited
from worker_svc.backends.cpu import CpuBackend
from worker_svc.sampling_rules import SamplerError

MODES: list[dict[str, str]] = [
    {"quantization": mode, "kv_dtype": kv} for mode in ("", "int8", "int4") for kv in ("auto", "int8")
]
mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode.values()).strip("-"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("llama")
    return path, checkpoints.save(path, LlamaConfig(**SMALL))


def setup(path: Path, **fields: Any) -> Setup:
    return plain_setup(path, **{"block_size": 32, "threads": 2, **fields})


def create(message: Setup, name: str = "auto", device: str = "auto", isa: str = "auto") -> DeviceBackend:
    return backends.create(name, message, Options(Path(message.model) / "home", device, isa))


def session(path: Path, isa: str = "auto", **fields: Any) -> Session:
    message = setup(path, **fields)
    return Session(message, create(message, "cpu", isa=isa))


@mode
def test_a_stream_however_it_is_planned(llama: tuple[Path, Any], mode: dict[str, str]) -> None:
    """Half of the requests sample: their noise must not know the plan either."""
    one, prompt = session(llama[0], **mode), tokens(45, 151)
    ways: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}]
    for fields in ways:
        expected = one.greedy(prompt, 20, **fields)
        assert [result.start for result in expected] == list(range(45, 65))
        assert ids(one.greedy(prompt, 20, slot=3, chunk=7, **fields)) == ids(expected)
        one.backend.reset(one.setup)
        readmitted = one.greedy(prompt + ids(expected)[:6], 14, **fields)
        assert ids(expected) == ids(expected)[:6] + ids(readmitted)
        assert ids(session(llama[0], **mode, threads=1).greedy(prompt, 20, **fields)) == ids(expected)


def test_workers_of_one_host_leave_threads_and_memory_to_each_other(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real = library.Library.open

    def noted(self: library.Library, spec: Any, threads: int, isa: str = "auto", cpus: int = 0) -> library.Model:
        opened.append(threads)
        return real(self, spec, 1, isa, cpus)

    monkeypatch.setattr(cpu, "usable_threads", lambda: 6)
    monkeypatch.setattr(library.Library, "open", noted)
    monkeypatch.setattr(base, "KV_BYTES", 1 << 60)
    for sharing in (1, 2, 4, 9):
        message = setup(llama[0], threads=0, sharing=sharing, kv_bytes=1 << 20)
        create(message, "cpu").load(message, lambda phase, share: None)
    assert opened == [6, 3, 1, 1]
    blocks = [base.kv_blocks(setup(llama[0], sharing=sharing, kv_bytes=0), 1 << 20) for sharing in (1, 2)]
    assert blocks[0] // 2 == blocks[1]


def test_logprobs_are_near_those_of_transformers(llama: tuple[Path, Any]) -> None:
    path, theirs = llama
    prompt = tokens(150, 151, seed=2)
    results = session(path).greedy(prompt, 1, chunk=100, prompt_logprobs=2, logprobs=1)
    scores = [score for result in results for score in result.prompt_logprobs]
    expected = torch.log_softmax(checkpoints.logits(theirs, prompt), -1)
    assert [score.token_id for score in scores] == prompt[1:]
    for position, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(expected[position][score.token_id]), abs=0.1)
        assert list(score.top_logprobs) == pytest.approx(expected[position].topk(2).values.tolist(), abs=0.1)
    assert results[-1].logprobs[0].logprob == pytest.approx(float(expected[-1].max()), abs=0.1)


def test_a_mask_comes_between_forward_and_sample(llama: tuple[Path, Any]) -> None:
    one, prompt = session(llama[0]), tokens(40, 151, seed=8)
    free = ids(one.greedy(prompt, 1))[0]
    words = np.zeros(-(-151 // 32), "<u4")
    for allowed in (free, 17):
        words[:] = 0
        words[allowed // 32] = 1 << (allowed % 32)
        admit = Admit(1, prompt, 40, [[1, 2]], Sampling(max_tokens=1, temperature=0.0))
        mask = Mask(EPOCH, one.steps + 1, [0], words.tobytes())
        assert ids(one.step([Row(1, 0, 40, sample=True, masked=True)], [admit], mask=mask)) == [allowed]
        one.step([], release=[1])


def test_logits_that_are_no_numbers_name_their_slot(tmp_path: Path) -> None:
    """Found when sampling; the fused call names it as the one after a mask does."""
    made = checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    checkpoints.overflow(made, 5)
    made.save_pretrained(tmp_path)
    one = session(tmp_path)
    sampling = Sampling(max_tokens=1, temperature=0.0)
    admits = [Admit(slot, [token], 1, [[slot]], sampling) for slot, token in ((1, 4), (2, 5))]
    with pytest.raises(SamplerError, match="slot 2: the model's logits are not numbers"):
        one.step([Row(1, 0, 1, sample=True), Row(2, 0, 1, sample=True)], admits)


@mode
def test_capacity_says_what_was_loaded(llama: tuple[Path, Any], mode: dict[str, str]) -> None:
    capacity = session(llama[0], **mode).capacity
    assert (capacity.exact, capacity.align, capacity.backend, capacity.dtype) == (True, 1, "cpu", "bfloat16")
    assert capacity.device == f"cpu {library.load().isas[0]}"
    assert capacity.quantization == mode["quantization"]
    assert capacity.kv_dtype == ("int8" if mode["kv_dtype"] == "int8" else "bfloat16")
    assert (capacity.vocab_size, capacity.max_model_len) == (151, 512)
    assert capacity.fingerprint == session(llama[0], **mode).capacity.fingerprint


def test_the_fingerprint_tells_arithmetics_apart(llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [session(llama[0], **mode).capacity.fingerprint for mode in MODES]
    found += [session(llama[0], isa=isa).capacity.fingerprint for isa in library.load().isas[1:]]
    found += [session(llama[0], max_model_len=100).capacity.fingerprint]
    monkeypatch.setattr("worker_svc.backends.cpu.source_digest", lambda: "other")
    found += [session(llama[0]).capacity.fingerprint]
    assert len(set(found)) == len(found)


def test_int8_kv_takes_about_half_the_memory(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, Qwen3Config(**SMALL, head_dim=64))
    wide, narrow = (session(tmp_path, kv_dtype=kv).capacity.num_blocks for kv in ("auto", "int8"))
    assert 1.7 < narrow / wide <= 2


def test_progress_is_told_while_packing(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, LlamaConfig(**{**SMALL, "num_hidden_layers": 12}))
    said: list[tuple[Phase, float]] = []
    for _ in range(2):
        create(setup(tmp_path)).load(setup(tmp_path), lambda phase, share: said.append((phase, share)))
    assert [phase for phase, _ in said] == [Phase.LOADING], "only the first start packs"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float32"}, "dtype 'float32' is not supported by the cpu backend, only 'auto', 'bfloat16'"),
        ({"quantization": "awq"}, "quantization 'awq' is not supported"),
        ({"kv_dtype": "fp8"}, "kv_dtype 'fp8' is not supported"),
        ({"speculation": "magic"}, "speculation 'magic' is not supported"),
        ({"speculation": "ngram"}, "num_drafts 0: must be at least 1"),
        ({"speculation": "draft", "num_drafts": 1}, "speculation 'draft' needs a draft_model"),
        ({"revision": "main"}, "revision 'main' is not supported"),
        ({"tp_size": 2}, "tp_size 2 is not supported"),
        ({"kv_host_bytes": 3}, "kv_host_bytes 3 must hold a block"),
        ({"kv_host_bytes": 1 << 60}, "kv_host_bytes 1152921504606846976 and the first tier's"),
        ({"block_size": 48}, "block_size 48 is no multiple of the cpu backend's 32"),
        ({"kv_bytes": 100}, "kv_bytes 100 must hold two blocks"),
        ({"kv_bytes": 1 << 60}, "more than this machine's memory"),
        ({"max_model_len": 513}, "max_model_len 513 is over the model's 512"),
        ({"kv_bytes": 100_000, "max_model_len": 512}, "is more than the .* tokens of KV memory"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"threads": 100_000}, f"threads 100000 is over this machine's {os.cpu_count()} CPUs"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    llama: tuple[Path, Any], fields: dict[str, Any], message: str
) -> None:
    asked = setup(llama[0], **fields)
    with pytest.raises(BackendError, match=message):
        load(CpuBackend(asked, "auto", "auto", llama[0]), asked)


def test_what_there_is_no_room_for_is_refused_before_anything_is_packed(
    llama: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(*arguments: Any) -> None:
        raise AssertionError("packed")

    monkeypatch.setattr("worker_svc.quant.packed.PackedStore.read", lambda store: None)
    monkeypatch.setattr("worker_svc.quant.packed.PackedStore.pack", pack)
    for fields in ({"max_model_len": 999_999}, {"kv_bytes": 100}, {"kv_bytes": 100_000, "max_model_len": 512}):
        asked = setup(llama[0], **fields)
        with pytest.raises(BackendError):
            load(CpuBackend(asked, "auto", "auto", tmp_path), asked)


def test_instructions_are_not_ignored_by_another_backend(
    llama: tuple[Path, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    for name, fields, why in (
        ("auto", {"dtype": "float32"}, "dtype 'float32' is torch's"),
        ("auto", {"block_size": 16}, "block_size 16 is no multiple"),
        ("torch", {}, "backend 'torch' has none"),
    ):
        with pytest.raises(BackendError, match=f"cpu_isa 'avx2' is the cpu backend's alone: {why}"):
            create(setup(llama[0], **fields), name, isa="avx2")
    assert "torch" not in capfd.readouterr().err


def test_an_instruction_set_that_is_not_here_is_refused(llama: tuple[Path, Any]) -> None:
    with pytest.raises(BackendError, match=r"cpu_isa 'neon': this host has only .*generic"):
        create(setup(llama[0]), "cpu", isa="neon")


def test_auto_takes_cpu_for_our_families_and_torch_for_the_rest(
    llama: tuple[Path, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from worker_svc.backends.torch import TorchBackend

    assert isinstance(create(setup(llama[0])), CpuBackend)
    assert isinstance(create(setup(llama[0], dtype="bfloat16")), CpuBackend)
    assert isinstance(create(setup(llama[0], dtype="float32")), TorchBackend)
    capfd.readouterr()
    checkpoints.save(tmp_path, GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}))
    for message, words in (
        (setup(tmp_path), "not of a family that the cpu backend knows; torch is asked instead\n"),
        (setup(llama[0], block_size=16), "block_size 16 is no multiple of the cpu backend's 32; torch is asked"),
    ):
        assert isinstance(create(message), TorchBackend)
        assert words in capfd.readouterr().err
        with pytest.raises(Unsuited):
            create(message, "cpu")


def test_without_a_compiler_torch_serves_and_says_so(
    llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def none() -> None:
        raise library.LibraryError("there is no C++ compiler")

    monkeypatch.setattr(library, "load", none)
    assert load(create(setup(llama[0])), setup(llama[0])).backend == "torch"
    assert capfd.readouterr().err == "pagewire worker: there is no C++ compiler; torch is asked instead\n"
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "worker_svc.backends.torch")
    with pytest.raises(BackendError, match=r"no C\+\+ compiler; .* is not installed: pip install 'pagewire\[torch\]'"):
        create(setup(llama[0]))
    assert "asked" not in capfd.readouterr().err, "nobody is"
    with pytest.raises(BackendError, match=r"^the torch backend needs torch"):
        create(setup(llama[0], dtype="float32"))
