"""Every library behind the attention's interface: the same answers, what each refuses, and who is chosen."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig

from protos.wire import Setup
from tests.gpu_worker import libraries
from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.plans import EPOCH, Plans
from tests.gpu_worker.runner import KIND, WHERE
from tests.kernels_triton.paged import Batch, Row, a_shape
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc.attention.choice import Where, choose
from worker_svc.attention.flashinfer import FlashInferAttention
from worker_svc.attention.paged import PagedAttention, Rows, UnsuitedAttention
from worker_svc.backends.base import BackendError
from worker_svc.gpu.backend import GpuBackend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the libraries themselves")
HOPPER, AMPERE, OTHER = (9, 0), (8, 0), (0, 0)
LIBRARIES = [("flashinfer", 32), ("flash_attn_interface", 32), ("flash_attn", 256), ("triton", 32)]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = {
        "flashinfer": libraries.flashinfer(),
        "flash_attn_interface": libraries.flash_attn_3(),
        "flash_attn": libraries.flash_attn_2(),
    }

    def install(*names: str) -> None:
        for name in made:  # None: it is not there, whatever this host has
            monkeypatch.setitem(sys.modules, name, made[name] if name in names else None)

    install()
    return install


def where(capability: tuple[int, int] = HOPPER) -> Where:
    return Where(KIND, WHERE, capability, flights=2, rows=4)


def made(library: str, capability: tuple[int, int], **shape: Any) -> PagedAttention:
    name = "flash_attn" if library == "flash_attn_interface" else library
    return choose(name, [a_shape(**{"dtype": torch.bfloat16, **shape})], where(capability)).attention[
        shape.get("window", 0)
    ]


def answers(attention: PagedAttention, batch: Batch, *, captured: bool) -> torch.Tensor:
    rows = Rows(batch.cu, torch.tensor([row.context for row in batch.rows], dtype=torch.int32), batch.tables.clamp(0))
    contexts = [row.context for row in batch.rows]
    if captured:
        plan = attention.plan_capture(len(contexts))
        attention.replan(len(contexts), contexts)
    else:
        plan = attention.plan([row.queries for row in batch.rows], contexts)
    out = torch.zeros_like(batch.q)
    attention.begin(plan, rows)
    attention.run(plan, batch.q, batch.pages, rows, out)
    return out


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (7, 0.0), (0, 5.0)])
@pytest.mark.parametrize(("library", "block_size"), LIBRARIES)
def test_all_answer_as_torch_does(library: str, block_size: int, window: int, softcap: float, installed: Any) -> None:
    installed(library)
    capability = AMPERE if library == "flash_attn" else HOPPER
    mixed = [Row(70, 20), Row(33, 1, 1), Row(64, 64, 2), Row(5, 2, 3)]
    for rows, captured in ((mixed, False), ([Row(70, 1), Row(1, 1, 1), Row(64, 1, 2)], True)):
        batch = Batch(a_shape(block_size=block_size, dtype=torch.bfloat16, max_context=256), rows)
        given = {"block_size": block_size, "window": window, "softcap": softcap, "max_context": 256}
        expected = answers(made("torch", OTHER, **given), batch, captured=captured)
        got = answers(made(library, capability, **given), batch, captured=captured)
        torch.testing.assert_close(got.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_torch_answers_as_the_kernels_oracle() -> None:
    batch = Batch(a_shape(dtype=torch.float32), [Row(70, 20), Row(33, 1, 1)])
    got = answers(made("torch", OTHER, dtype=torch.float32), batch, captured=False)
    torch.testing.assert_close(got, torch.cat(list(batch.expected())), atol=2e-5, rtol=2e-5)


def test_no_plan_is_written_where_another_may_not_have_been_copied_yet(installed: Any) -> None:
    installed("flashinfer")
    attention = made("flashinfer", HOPPER)
    assert isinstance(attention, FlashInferAttention)
    wrapper = attention.plan_capture(2).wrapper
    attention.plan_capture(3)
    for _ in range(4):
        attention.replan(2, [5, 6])
    used = wrapper.planned_from[1:]
    assert used[0] != used[1]
    assert used[:2] == used[2:]
    eager = [attention.plan([1], [9]).wrapper for _ in range(4)]
    assert eager[0] is not eager[1]
    assert eager[:2] == eager[2:]


@pytest.mark.parametrize(
    ("asked", "there", "capability", "shape", "message"),
    [
        ("flashinfer", (), HOPPER, {}, "flashinfer is not installed"),
        ("flashinfer", ("flashinfer",), OTHER, {}, "flashinfer needs an NVIDIA GPU of compute capability 8.0"),
        ("flashinfer", ("flashinfer",), HOPPER, {"dtype": torch.float32}, "flashinfer takes no float32"),
        ("flashinfer", ("flashinfer",), HOPPER, {"dim": 80}, "heads of 64, 128 or 256, and these have 80"),
        ("flashinfer", ("flashinfer",), HOPPER, {"kv_dtype": torch.float8_e4m3fn}, "its scales on the host"),
        ("flashinfer", ("flashinfer",), HOPPER, {"batch_invariant": True}, "splits keys by what else"),
        ("flash_attn", (), HOPPER, {}, "flash_attn is not installed"),
        ("flash_attn", ("flash_attn",), HOPPER, {}, "flash_attn 2 takes blocks of a multiple of 256 positions, and"),
        ("flash_attn", ("flash_attn_interface",), AMPERE, {}, "flash_attn is not installed"),
        ("flash_attn", ("flash_attn_interface",), HOPPER, {"dtype": torch.float32}, "flash_attn takes no float32"),
        ("flash_attn", ("flash_attn_interface",), HOPPER, {"kv_dtype": torch.float8_e4m3fn}, "queries of float8"),
        ("flash_attn", ("flash_attn_interface",), HOPPER, {"batch_invariant": True}, "splits keys by what else"),
    ],
)
def test_what_a_library_refuses(
    asked: str, there: tuple[str, ...], capability: tuple[int, int], shape: Any, message: str, installed: Any
) -> None:
    installed(*there)
    with pytest.raises(UnsuitedAttention, match=message):
        choose(asked, [a_shape(**{"dtype": torch.bfloat16, **shape})], where(capability))


def test_a_library_that_plans_from_exact_lengths_refuses_drafts(installed: Any) -> None:
    installed("flashinfer")
    with pytest.raises(UnsuitedAttention, match="flashinfer plans from lengths that no host knows with drafts"):
        choose("flashinfer", [a_shape(dtype=torch.bfloat16)], replace(where(HOPPER), num_drafts=2))


def test_the_first_that_can_is_chosen_and_the_others_reasons_are_told(installed: Any) -> None:
    shapes = [a_shape(dtype=torch.bfloat16), a_shape(dtype=torch.bfloat16, window=8)]
    choice = choose("auto", shapes, where())
    assert choice.name == "triton"
    assert choice.reason.startswith("flash_attn is not installed")
    assert list(choice.attention) == [0, 8]
    installed("flash_attn_interface")
    assert choose("auto", shapes, where()).name == "flash_attn"
    assert (
        choose("auto", [shapes[0], replace(shapes[1], dtype=torch.float32, kv_dtype=torch.float32)], where()).name
        == "triton"
    )
    assert choose("triton", shapes, where()).reason == "asked for"


# ---------------------------------------------------------------- whole steps

CONFIGS = {
    "llama": LlamaConfig(**{**SMALL, "num_hidden_layers": 2, "head_dim": 64}),
    "gemma2": Gemma2Config(
        **{**SMALL, "num_hidden_layers": 2, "head_dim": 64}, sliding_window=16, query_pre_attn_scalar=64
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    checkpoints.save(path, CONFIGS[request.param])
    return path


def tokens(model: Path, attention: str, captured: tuple[int, ...]) -> list[list[Any]]:
    rng = random.Random(5)
    place = FakePlace(rng, total=1 << 24, capability=HOPPER)
    backend = GpuBackend(place, lambda: None, 0.5, captured, attention)
    setup = Setup(EPOCH, str(model), dtype="auto", block_size=8, max_slots=4, max_model_len=64, max_step_tokens=48)
    backend.load(setup, lambda phase, share: None)
    flights = []
    for plan in Plans(random.Random(6), vocab=151, chunk=25, outputs=(3, 5)).take(8, streams=4, temperature=0.0):
        backend.forward(plan)
        flights.append(backend.sample(None))
    got = [landing.rows() for landing in flights]
    backend.close()
    return got


def test_steps_in_flight_have_the_tokens_of_torch(
    model: Path, installed: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    installed("flashinfer", "flash_attn_interface")
    expected = tokens(model, "torch", ())
    assert tokens(model, "flashinfer", (1, 2, 4)) == expected
    assert "attention by flashinfer: asked for" in capfd.readouterr().err
    assert tokens(model, "auto", (1, 2, 4)) == expected
    assert "attention by flash_attn: the first choice" in capfd.readouterr().err


def test_what_was_asked_for_and_cannot_be_had_is_no_other(model: Path, installed: Any) -> None:
    with pytest.raises(BackendError, match="attention_backend 'flashinfer': flashinfer is not installed"):
        tokens(model, "flashinfer", ())
