"""Which backend serves, on hosts with and without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from protos.wire import Setup
from tests.gpu_worker.plans import EPOCH
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc import backends
from worker_svc.backends.base import BackendError, DeviceBackend, Options, Unsuited
from worker_svc.backends.cpu import CpuBackend
from worker_svc.backends.fake import FakeBackend
from worker_svc.backends.torch import TorchBackend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path, LlamaConfig(**SMALL))
    return path


def create(path: Path, name: str = "auto", dtype: str = "auto", **options: Any) -> DeviceBackend:
    setup = Setup(epoch=EPOCH, model=str(path), dtype=dtype)
    return backends.create(name, setup, Options(home=path / "home", **options))


def test_a_gpu_that_torch_cannot_use_is_told_and_the_cpu_serves(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(backends, "_GPUS", (str(tmp_path),))
    assert isinstance(create(llama), CpuBackend)
    assert capfd.readouterr().err == "pagewire worker: torch sees no GPU; cpu is asked instead\n"
    assert isinstance(create(llama, dtype="float32"), TorchBackend)
    assert capfd.readouterr().err == "pagewire worker: torch sees no GPU; torch is asked instead\n"
    assert isinstance(create(llama, isa="generic"), CpuBackend)
    assert isinstance(create(llama, device="cpu"), CpuBackend)
    assert isinstance(backends.create("auto", Setup(EPOCH, "fake:"), Options(tmp_path)), FakeBackend)
    assert capfd.readouterr().err == ""


def test_nothing_is_said_where_there_is_none(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert isinstance(create(llama), CpuBackend)
    assert capfd.readouterr().err == ""


def test_nobody_serves_in_its_place_where_a_gpu_was_asked_for(llama: Path) -> None:
    with pytest.raises(Unsuited, match=r"^torch sees no GPU$"):
        create(llama, "cuda")
    with pytest.raises(BackendError, match=r"^torch sees no GPU$"):
        create(llama, device="cuda:1")
    with pytest.raises(BackendError, match="attention_backend 'triton' is the cuda backend's alone"):
        create(llama, attention="triton")
    with pytest.raises(BackendError, match="cpu_isa 'avx2' is the cpu backend's alone: backend 'cuda' has none"):
        create(llama, "cuda", isa="avx2")
