"""What the tables say of figures that are known."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import compare, contestants, machine, record
from benchmarks.contestants import UnknownContestantError
from benchmarks.measure import Run, order
from benchmarks.peers import catalogue
from client import store
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


def test_a_checkpoint_is_ours_beside_the_peers_and_our_bf16() -> None:
    gptq = [run("a-gptq", number, result("a", 640), checkpoint=True) for number in range(3)]
    failed = Run("w8a8", 0, None, None, None, None, None, [], "exited with 1", checkpoint=True)
    runs = [*gptq, failed, *RUNS]
    assert compare.names(runs) == ["bf16", "a-gptq", "w8a8", "llama-bf16", "openvino-int8"]
    ratios = {(each.mode, each.workload): each for each in compare.ratios(runs) if each.whom == "openvino-int8"}
    found = ratios["a-gptq", "a"]
    assert found.ratio == pytest.approx(640 / 120)
    assert found.target is None
    assert ratios["bf16", "a"].theirs == 120, "a checkpoint of ours is nobody's peer"
    lines = compare.markdown(runs, []).splitlines()
    assert "| a | a-gptq | 640 | openvino-int8 | 120 | 5.33× |  |  |" in lines
    assert "| **a-gptq** | 4.27× | – | – |" in lines
    assert "| **w8a8** | – | – | – |" in lines
    assert "over our bf16" not in compare.markdown(RUNS, [])


def test_who_failed_is_named_and_has_no_figures() -> None:
    failed = Run("vllm-bf16", 0, None, None, None, None, None, [], "exited with 1")
    lines = compare.markdown([*RUNS, failed], []).splitlines()
    assert "vllm-bf16 failed in round 1: exited with 1" in lines
    assert "| vllm-bf16 | – | – | – |" in lines
    assert "| vllm-bf16 | – | – | – | – | – % |" in lines


def test_a_record_is_read_back_and_drawn(tmp_path: Path) -> None:
    runs = [*RUNS, run("gptq", 0, result("a", 200), checkpoint=True)]
    record.write(tmp_path / "x", runs, seed=3)
    assert record.read(tmp_path / "x.json") == runs
    text = record.summary(tmp_path / "x", runs)
    assert (tmp_path / "x.md").read_text() == text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(record.RecordError, match=r"y\.json is no record of a run"):
        record.read(tmp_path / "y.json")


def test_a_record_of_before_there_were_checkpoints_is_read(tmp_path: Path) -> None:
    record.write(tmp_path / "x", RUNS, seed=3)
    content = json.loads((tmp_path / "x.json").read_text())
    for each in content["runs"]:
        del each["checkpoint"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert record.read(tmp_path / "x.json") == RUNS


def test_a_record_holds_names_and_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--ours", f"gptq={tmp_path}/some/w4", "--rounds", "1"])
    record.write(tmp_path / "x", RUNS, seed=3)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text)["command"][3:] == ["--ours", "gptq=…/w4", "--rounds", "1"]
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("'/a/b c' and \"/d/e.gguf\": no model", "'…/b c' and \"…/e.gguf\": no model"),
        ("name=~/models/w4 ../../x/w8 ./y/z", "name=…/w4 …/w8 …/z"),
        ("300 tokens/s, http://host:80/v1/models and /health", "300 tokens/s, http://host:80/v1/models and /health"),
    ],
)
def test_of_a_path_its_name_is_left(text: str, left: str) -> None:
    assert machine.anywhere(text) == left


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


def test_a_checkpoint_is_served_under_its_name(tmp_path: Path) -> None:
    paths = [tmp_path / "w4", tmp_path / "w8.gguf"]
    paths[0].mkdir()
    paths[1].touch()
    first, second = contestants.checkpoints([("gptq", str(paths[0])), ("awq", str(paths[1]))], ["--threads", "1"])
    assert first.command(7)[3:] == ["serve", str(paths[0].resolve()), "--port", "7", "--threads", "1"]
    assert [(each.name, each.checkpoint) for each in (first, second)] == [("gptq", True), ("awq", True)]
    with pytest.raises(store.StoreError, match="neither a path"):
        contestants.checkpoints([("gptq", str(tmp_path / "absent"))], [])
    for names in (["int8"], ["llama-q4_0"], ["x", "x"]):
        with pytest.raises(UnknownContestantError, match=f"^{names[-1]} is the name of another contestant$"):
            contestants.checkpoints([(name, str(tmp_path)) for name in names], [])


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
