"""The arithmetic of the accuracy table, and the talk with other engines' programs."""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.accuracy import Reading, _results, _windows
from benchmarks.divergence import Estimate, Marks, Reference
from benchmarks.peers.catalogue import peers
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.openvino import OpenVINO
from benchmarks.process import StartError
from benchmarks.readers import Program

VOCAB = 1000


def _pair(noise: float, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = 6 * torch.randn(rows, VOCAB, generator=generator)
    other = logits + noise * torch.randn(rows, VOCAB, generator=generator)
    return logits, other, torch.randint(VOCAB, (rows,), generator=generator)


@pytest.mark.parametrize("noise", [3.0, 0.1, 1e-3])
def test_divergence_is_that_of_float64(noise: float) -> None:
    logits, other, targets = _pair(noise)
    p, q = (torch.log_softmax(x.double(), -1) for x in (logits, other))
    marks = Reference(logits, targets).marks(other)
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(marks.kl, expected, rtol=1e-4, atol=1e-9)
    rows = torch.arange(len(targets))
    torch.testing.assert_close(marks.rise, (p - q)[rows, targets], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(Reference(logits, targets).surprise, -p[rows, targets], rtol=1e-6, atol=1e-6)
    assert marks.same.tolist() == (p.argmax(-1) == q.argmax(-1)).double().tolist()


def test_a_constant_added_to_all_logits_changes_no_distribution() -> None:
    logits, _, targets = _pair(0)
    marks = Reference(logits, targets).marks(logits + torch.tensor([-30.0, -1.0, 0.0, 2.0, 40.0])[:, None])
    assert marks.kl.abs().max() < 1e-9
    assert marks.rise.abs().max() < 1e-5
    assert marks.same.tolist() == [1.0] * 5


def test_marks_leave_what_they_compare_as_it_was() -> None:
    logits, other, targets = _pair(1.0)
    copies = logits.clone(), other.clone()
    reference = Reference(logits, targets)
    first, second = reference.marks(other), reference.marks(other)
    assert torch.equal(logits, copies[0])
    assert torch.equal(other, copies[1])
    assert torch.equal(first.kl, second.kl)


def test_standard_error_and_growth() -> None:
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert estimate.mean == 2.5
    assert math.isclose(estimate.error, math.sqrt(5 / 3) / 2)
    growth = Estimate(math.log(1.25), 0.01).as_growth()
    assert math.isclose(growth.mean, 0.25)
    assert math.isclose(growth.error, 0.0125)


class _Named:
    about = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, tokens: object, start: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        raise NotImplementedError

    def close(self) -> None: ...


def test_results_compare_with_float32_with_bf16_and_by_position() -> None:
    window = 512
    surprise = torch.full((2 * (window - 1),), math.log(10.0), dtype=torch.float64)
    position = torch.arange(window - 1).repeat(2)

    def marks(kl: float, rise: float) -> Marks:
        early = (position < 256).double()
        return Marks(kl * (1 + early), torch.full_like(surprise, rise), early)

    bf16, int8 = (Reading(_Named(name)) for name in ("bf16", "int8"))
    bf16.parts, int8.parts = [marks(0.001, math.log(1.1))], [marks(0.002, math.log(1.21))]
    first, second = _results([bf16, int8], surprise, window)
    assert math.isclose(first.perplexity, 11.0)
    assert math.isclose(second.growth.mean, 0.21, rel_tol=1e-6)
    assert second.growth_over_bf16 is not None
    assert math.isclose(second.growth_over_bf16.mean, 0.1, rel_tol=1e-6)
    assert second.kl_by_position == pytest.approx({"0–256": 0.004, "256–512": 0.002})
    assert second.kl_greatest == pytest.approx(0.004)
    assert second.same_likeliest == pytest.approx(256 / 511)
    assert _results([int8], surprise, window)[0].growth_over_bf16 is None


def test_windows_are_whole_and_from_the_beginning() -> None:
    tokens = np.arange(2500)
    assert [w.tolist() for w in _windows(tokens, 1024, 0)] == [list(range(1024)), list(range(1024, 2048))]
    assert len(_windows(tokens, 1024, 1)) == 1
    with pytest.raises(StartError, match="2500 tokens"):
        _windows(tokens, 4096, 0)


def _program(tmp_path: Path, body: str, vocab: int = 3) -> Program:
    """Python in the place of an engine."""
    script = tmp_path / "engine.py"
    lines = f"""
        import struct, sys
        take, give = sys.stdin.buffer.read, sys.stdout.buffer
        give.write(struct.pack("i", 3)); give.flush()
        while head := take(8):
            start, count = struct.unpack("ii", head)
            tokens = struct.unpack(f"{{count}}i", take(4 * count))
            {body}
            give.flush()
    """
    script.write_text(textwrap.dedent(lines))
    return Program("engine", "", [sys.executable, script], vocab)


def test_a_program_is_asked_for_each_chunk(tmp_path: Path) -> None:
    program = _program(
        tmp_path, 'give.write(struct.pack(f"{3 * count}f", *(start + t * i for t in tokens for i in (1, 2, 3))))'
    )
    try:
        tokens = np.array([5, 6, 7, 8])
        assert program.read(tokens[:3], 0).tolist() == [[5, 10, 15], [6, 12, 18], [7, 14, 21]]
        assert program.read(tokens, 3).tolist() == [[11, 19, 27]]
    finally:
        program.close()


def test_a_program_that_dies_is_an_error_with_its_status(tmp_path: Path) -> None:
    program = _program(tmp_path, 'give.write(b"half"); give.flush(); sys.exit(3)')
    with pytest.raises(StartError, match="engine ended with status 3"):
        program.read(np.array([1]), 0)
    program.close()


def test_a_program_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="vocabulary of 3, not 4"):
        _program(tmp_path, "pass", vocab=4)


def test_only_what_is_installed_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path))
    assert LlamaCpp().logits(2048, 2) == OpenVINO().logits(2) == {}
    llama, openvino = tmp_path / "peers" / "llama.cpp", tmp_path / "peers" / "openvino"
    for file in (llama / "llama_logits", llama / "models" / "q4_1.gguf"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert LlamaCpp().logits(2048, 2) == {
        "llama-q4_1": [f"{llama}/llama_logits", f"{llama}/models/q4_1.gguf", "2048", "2"]
    }
    for kind in ("fp16", "int8"):
        (openvino / kind).mkdir(parents=True)
        (openvino / kind / "openvino_model.bin").touch()
    commands = OpenVINO().logits(2)
    assert commands.keys() == {"openvino-fp16", "openvino-int8"} <= peers().keys()
    assert commands["openvino-int8"][2:] == [f"{openvino}/int8", "2"]
    assert Path(commands["openvino-int8"][1]).exists()
