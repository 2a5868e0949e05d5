"""What the tables say of figures that are known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import compare, contestants, record
from benchmarks.contestants import UnknownContestantError
from benchmarks.measure import Run, order
from benchmarks.peers import catalogue
from tests.benchmarks.runs import result, run

RUNS = [
    run("bf16", 0, result("a", 160), result("b", 900), result("d", 3000, itl_p99=251), start=3.5),
    run("bf16", 1, result("a", 100), result("b", 900), result("d", 3000, itl_p99=251), start=3.5),
    run("bf16", 2, result("a", 150), result("b", 900), result("d", 3000, itl_p99=251), start=3.5),
    run("llama-bf16", 0, result("a", 100), result("b", 300), result("d", 1000)),
    run("openvino-int8", 0, result("a", 120), result("b", 700), result("d", 2000)),
]


def test_ours_is_put_beside_the_peer_of_the_target_and_the_best_one() -> None:
    ratios = {(each.workload, each.whom): each for each in compare.ratios(RUNS)}
    latency = ratios["a", "llama-bf16"]
    assert (latency.ours, latency.ratio, latency.target, latency.met) == (150, 1.5, 1.4, True), (
        "the median, not the mean"
    )
    assert ratios["a", "openvino-int8"].target is None, "the best peer beside it, without a target"
    assert ratios["b", "openvino-int8"].ratio == pytest.approx(900 / 700)
    assert ratios["b", "openvino-int8"].met is False
    assert ratios["b", "openvino-int8"].aim == pytest.approx(1.45 * 700)
    assert ratios["d", "openvino-int8"].met is True, "the best by prompt and output"
    assert set(ratios) == {("a", "llama-bf16"), ("a", "openvino-int8"), ("b", "openvino-int8"), ("d", "openvino-int8")}


def test_a_peer_that_was_not_measured_has_no_ratio() -> None:
    (ratio,) = compare.ratios([run("int8", 0, result("a", 200))])[:1]
    assert (ratio.whom, ratio.theirs, ratio.ratio, ratio.met) == ("llama-q8_0", None, None, None)


def test_every_target_names_a_workload_and_a_contestant() -> None:
    for mode, targets in compare.TARGETS.items():
        assert mode in contestants.MODES
        for workload, (ratio, whom) in targets.items():
            assert workload in "abcde"
            assert ratio > 1
            assert whom == compare.BEST or whom in catalogue.peers()


def test_the_text_names_what_was_missed_and_who_was_absent() -> None:
    text = compare.markdown(RUNS, ["vllm-bf16"])
    lines = text.splitlines()
    assert "| a | bf16 | 150 | llama-bf16 | 100 | 1.50× | ≥ 1.40× | met |" in lines
    assert "| b | bf16 | 900 | openvino-int8 | 700 | 1.29× | ≥ 1.45× | **missed** |" in lines
    assert "| **bf16** | 50 / 20 | 50 / 20 | 50 / 251 **missed** |" in lines, "250 ms between messages under prefill"
    assert "| **bf16** | 3.50 **missed** | 300 | 400 | 0.004 | 2.0 % |" in lines
    assert "| llama-bf16 | 1.00 | 300 | 400 | 0.004 | 2.0 % |" in lines
    assert "Not installed, so not measured: vllm-bf16." in lines


def test_who_failed_is_named_and_has_no_figures() -> None:
    failed = Run("vllm-bf16", 0, None, None, None, None, None, [], "exited with 1")
    lines = compare.markdown([*RUNS, failed], []).splitlines()
    assert "vllm-bf16 failed in round 1: exited with 1" in lines
    assert "| vllm-bf16 | – | – | – |" in lines
    assert "| vllm-bf16 | – | – | – | – | – % |" in lines


def test_a_record_is_read_back_and_drawn(tmp_path: Path) -> None:
    record.write(tmp_path / "x", RUNS, seed=3)
    assert record.read(tmp_path / "x.json") == RUNS
    text = record.summary(tmp_path / "x", RUNS)
    assert (tmp_path / "x.md").read_text() == text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(record.RecordError, match=r"y\.json is no record of a run"):
        record.read(tmp_path / "y.json")


def test_nobody_is_always_first_or_behind_the_same_one() -> None:
    chosen = [contestants.openai(name, "server {port}") for name in "abcdefg"]
    rounds = [[each.name for each in order(chosen, number)] for number in range(3)]
    assert all(sorted(names) == list("abcdefg") for names in rounds)
    assert len({names[0] for names in rounds}) == 3
    pairs = [set(pairwise(names)) for names in rounds]
    assert not pairs[0] & pairs[1], "every second round goes the other way"


def test_contestants_go_by_name() -> None:
    mode, *_ = contestants.choose(["int8+kv8"], "m.gguf", ["--threads", "1"])
    assert mode.command(7)[3:] == (
        ["serve", "m.gguf", "--port", "7", "--quantization", "int8", "--kv-cache-dtype", "int8", "--threads", "1"]
    )
    with pytest.raises(UnknownContestantError, match="'nobody' is no contestant; there are bf16, "):
        contestants.choose(["nobody"], "m.gguf", [])


def test_a_tailored_peer_gets_the_slots_of_each_workload() -> None:
    peer = contestants.peer("llama-q8_0")
    assert peer.tailored
    command = peer.command(12345, slots=4)
    assert command[command.index("--parallel") + 1] == "4"
    assert command[command.index("--ctx-size") + 1] == "8192", "2048 tokens a slot"
    assert not contestants.peer("openvino-int8").tailored


def test_a_peer_that_is_not_installed_says_how_it_would_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path))
    assert contestants.everybody() == list(contestants.MODES)
    assert contestants.absent() == list(catalogue.peers())
    with pytest.raises(UnknownContestantError, match=r"^vllm-bf16 is not installed: .* install vllm$"):
        contestants.choose(["vllm-bf16"], "m.gguf", [])
