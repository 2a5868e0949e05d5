"""The table of quantized checkpoints on tiny ones: what is read, what is refused, and what is merged."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.process import StartError
from benchmarks.quantized import BASE, Text, measure, table, theirs_of
from tests.quantized.make import common, perplexity

CHECKPOINTS = Path(__file__).parents[1] / "quantized" / "checkpoints"
NAME = "auto_round_gptq_w8_g32"  # made of what `folder` has as its base
TEXT = Text([np.array(common.TOKENS, np.int64)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "quantized"
    made.mkdir()
    with contextlib.chdir(tmp_path):
        shutil.move(common.save(common.model(common.NARROW)), made / BASE)
    (made / BASE / "made.json").write_text('{"producer": "Pagewire"}')
    shutil.copytree(CHECKPOINTS / NAME, made / NAME)
    (made / NAME / "expected.safetensors").rename(tmp_path / "expected.safetensors")
    return made


def producers(folder: Path, wrong: float = 0.0, dropped: int = 0) -> dict[str, Any]:
    """What `perplexity` writes, of the logits that came with the checkpoint, each token's −log p `wrong` by so much."""
    logits = load_file(folder.parent / "expected.safetensors")["logits"]
    targets = torch.tensor(common.TOKENS[1:])
    surprise = wrong - torch.log_softmax(logits[:-1], -1).gather(1, targets[:, None])[:, 0]
    return {NAME: {"how": "its library", "versions": {"x": "1"}, "surprise": surprise.tolist()[dropped:]}}


def test_a_checkpoint_beside_its_base_and_its_producer(folder: Path) -> None:
    base, one = measure(folder, [BASE, NAME], TEXT, producers(folder), 1)
    assert base.cpu is not None
    assert base.float32 is not None
    assert (base.float32.kl.mean, base.float32.growth.mean, base.float32.same_likeliest) == (0, 0, 1)
    assert 0 < base.cpu.kl.mean < 1e-3
    assert (base.theirs, base.why_not) == (None, "")
    assert one.cpu is not None
    assert one.float32 is not None
    assert one.theirs is not None
    assert 1e-6 < one.float32.kl.mean < 0.01
    assert "gptq" in one.cpu.about
    assert "w8a16" in one.cpu.about
    assert one.nbytes == (folder / NAME / "model.safetensors").stat().st_size
    assert one.made["producer"] == "AutoRound"
    assert math.isclose(one.theirs.perplexity, one.float32.perplexity, rel_tol=1e-4)
    assert one.theirs.apart_from_float32 < 1e-4 < one.theirs.apart_from_cpu < 0.05
    assert math.isclose(one.float32.perplexity, base.float32.perplexity * (1 + one.float32.growth.mean), rel_tol=1e-6)
    assert table([base, one], {"tokens": 12, "text": "t", "window": 12, "compared_with": BASE}).row_count == 2


def test_a_producer_that_reads_otherwise_is_apart(folder: Path) -> None:
    (one,) = measure(folder, [NAME], TEXT, producers(folder, wrong=0.1), 1)
    assert one.theirs is not None
    assert one.float32 is not None
    assert one.theirs.apart_from_float32 == pytest.approx(0.1, rel=1e-3)
    assert one.theirs.perplexity == pytest.approx(one.float32.perplexity * math.exp(0.1), rel=1e-3)


def test_a_checkpoint_that_is_refused_is_told_without_where_it_lies(folder: Path) -> None:
    config = json.loads((folder / NAME / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    (folder / NAME / "config.json").write_text(json.dumps(config))
    (one,) = measure(folder, [NAME], TEXT, {}, 1)
    assert (one.cpu, one.float32, one.theirs) == (None, None, None)
    assert one.why_not.startswith("refused: ")
    drawn = table([one], {"tokens": 12, "text": "t", "window": 12, "compared_with": BASE})
    assert (drawn.row_count, drawn.caption) == (1, f"{NAME}: {one.why_not}")
    assert "bitsandbytes" in one.why_not
    assert str(folder) not in one.why_not


def test_why_a_producer_did_not_run_is_told(folder: Path) -> None:
    (one,) = measure(folder, [NAME], TEXT, {NAME: {"reason": "needs a GPU"}}, 1)
    assert one.cpu is not None
    assert (one.theirs, one.why_not) == (None, "its library does not run it: needs a GPU")


def test_results_of_another_text_are_not_merged(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps({"digest": TEXT.digest, "models": producers(folder)}))
    assert theirs_of(file, TEXT) == producers(folder)
    with pytest.raises(StartError, match=r"theirs\.json is of other tokens"):
        theirs_of(file, Text([TEXT.windows[0][:6], TEXT.windows[0][6:]][:1]))
    with pytest.raises(StartError, match="9 tokens are scored there, 11 here"):
        measure(folder, [NAME], TEXT, producers(folder, dropped=2), 1)


def test_a_library_is_asked_for_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    """The script that runs in a producer's environment, in one that has transformers alone."""
    tokens, out = tmp_path / "tokens.json", tmp_path / "theirs.json"
    tokens.write_text(json.dumps({"digest": TEXT.digest, "windows": [common.TOKENS]}))
    out.write_text(json.dumps({"digest": TEXT.digest, "models": {"another": {"reason": "of another environment"}}}))
    perplexity.main([str(tokens), str(folder), str(out)])
    told = theirs_of(out, TEXT)
    assert told.keys() == {"another", BASE}
    (base,) = measure(folder, [BASE], TEXT, told, 1)
    assert base.theirs is not None
    assert base.theirs.apart_from_float32 < 1e-5
    assert base.theirs.versions.keys() == {"torch", "transformers"}


def test_a_second_reading_stands_in_for_a_library_that_does_not_run(folder: Path) -> None:
    """Here none of the producers is installed."""
    told = perplexity.of(folder / NAME, "LLM Compressor", [common.TOKENS])
    assert "compressed_tensors" in told["reason"]
    assert "reading.py" in told["how"]
    (one,) = measure(folder, [NAME], TEXT, {NAME: told | {"versions": {}}}, 1)
    assert one.theirs is not None
    assert one.theirs.apart_from_float32 < 1e-5
    assert one.why_not == f"its library does not run it: {told['reason']}"


def test_what_neither_reads_has_a_reason_alone(folder: Path) -> None:
    (folder / BASE / "model.safetensors").write_bytes(b"nothing")
    (reason,) = perplexity.of(folder / BASE, "", [common.TOKENS]).values()
    assert "rror" in reason
