"""The library is compiled once for each state of its sources, whole or not at all, and says plainly where it cannot be.

A compiler of a few lines of shell stands in for the real one, except where the result is run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels.cpu import build, library
from kernels.cpu.build import LibraryError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, sources of two small files, and the fake compiler."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "step.cpp").write_text('#include "step.h"\n')
    (sources / "step.h").write_text('#include "deep.h"\n')
    (sources / "deep.h").write_text("// 1\n")
    (sources / "test_step.cpp").write_text("// for tests\n")
    (sources / "isa_generic.cpp").write_text("// kernels\n")
    _compiler(tmp_path, 'echo "$@" >> calls; while [ "$1" != -o ]; do shift; done; sleep 0.05; echo built > "$2"')
    monkeypatch.setenv("PAGEWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.chdir(tmp_path)
    build.source_digest.cache_clear()
    yield tmp_path
    build.source_digest.cache_clear()


def _compiler(directory: Path, script: str) -> None:
    path = directory / "cxx"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _calls(home: Path) -> list[str]:
    calls = home / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.write_text("")
    return lines


def _compiled(home: Path) -> list[str]:
    return sorted(Path(line.split(" -c ")[1].split()[0]).name for line in _calls(home) if " -c " in line)


def test_once_with_one_line_of_progress_then_from_the_cache(home: Path) -> None:
    said: list[str] = []
    path = build.library(said.append)
    assert path.read_text() == "built\n"
    assert path.parent == home / "home" / "kernels"
    assert said == [f"pagewire: compiling the CPU kernels with {home / 'cxx'} (2 files), once"]
    assert _compiled(home) == ["isa_generic.cpp", "step.cpp"]
    assert build.library(said.append) == path
    assert (len(said), _calls(home)) == (1, [])


def test_what_changed_is_compiled_again(home: Path) -> None:
    first = build.library(lambda line: None)
    _calls(home)
    (build.SOURCES / "deep.h").write_text("// 2\n")
    assert build.library(lambda line: None) != first
    assert _compiled(home) == ["step.cpp"]
    _compiler(home, (home / "cxx").read_text().splitlines()[1] + " # another version")
    build.library(lambda line: None)
    assert _compiled(home) == ["isa_generic.cpp", "step.cpp"]


def test_the_tests_library_is_another(home: Path) -> None:
    plain, testing = build.library(lambda line: None), build.library(lambda line: None, testing=True)
    assert plain != testing
    assert _compiled(home) == ["isa_generic.cpp", "step.cpp", "test_step.cpp"]


def test_two_at_once_compile_once(home: Path) -> None:
    found: list[Path] = []
    both = [threading.Thread(target=lambda: found.append(build.library(lambda line: None))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert found[0] == found[1]
    assert _compiled(home) == ["isa_generic.cpp", "step.cpp"]


def test_a_compile_that_fails_leaves_nothing_and_names_the_error(home: Path) -> None:
    _compiler(home, 'echo "deep.h:1:1: error: no such thing" >&2; exit 1')
    with pytest.raises(LibraryError, match=r"do not compile with .*cxx: deep.h:1:1: error: no such thing"):
        build.library(lambda line: None)
    kept = [path for path in (home / "home" / "kernels").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["lock"]


def test_no_compiler_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -g")
    with pytest.raises(LibraryError, match=r"CXX names is not there: '/nowhere/g\+\+'"):
        build.library(lambda line: None)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LibraryError, match=r"need a C\+\+ compiler once.*install g\+\+.*clang\+\+"):
        build.library(lambda line: None)


def test_a_prebuilt_library_needs_no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prebuilt = build.into_package(lambda line: None)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert build.library(lambda line: None) == prebuilt
    (build.SOURCES / "deep.h").write_text("// its sources went on\n")
    build.source_digest.cache_clear()
    with pytest.raises(LibraryError, match="CXX"):
        build.library(lambda line: None)


def _no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "CXX":
        monkeypatch.setenv("CXX", "/nowhere/g++")
    else:
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize("how", ["CXX", "PATH"])
def test_without_a_compiler_what_it_made_of_these_sources_serves(
    home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whichever compiler made it, the newest; never what was made of other sources, with other flags, or for tests."""
    first = build.library(lambda line: None)
    build.library(lambda line: None, testing=True)
    build.library(lambda line: None, sanitize=True)
    _compiler(home, (home / "cxx").read_text().splitlines()[1] + " # another version")
    second = build.library(lambda line: None)
    os.utime(first, (1, 1))
    _no_compiler(home, monkeypatch, how)
    assert build.library(lambda line: None) == second
    second.unlink()
    assert build.library(lambda line: None) == first
    assert first.stat().st_mtime > 1, "it is in use"
    (build.SOURCES / "deep.h").write_text("// other sources\n")
    with pytest.raises(LibraryError, match="compiler"):
        build.library(lambda line: None)
    (build.SOURCES / "deep.h").write_text("// 1\n")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    with pytest.raises(LibraryError, match="compiler"):
        build.library(lambda line: None)


def test_a_compiler_that_makes_nothing_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(LibraryError, match=r"do not compile with true: it ends without an error, and without the file"):
        build.library(lambda line: None)


def test_what_a_killed_compile_left_goes_with_the_next(home: Path) -> None:
    left = home / "home" / "kernels" / "tmpabc123"
    left.mkdir(parents=True)
    (left / "step.o").write_text("half")
    build.library(lambda line: None)
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("PAGEWIRE_HOME", str(home / "file"))
    with pytest.raises(LibraryError, match=f"cannot be compiled into {home / 'file'}"):
        build.library(lambda line: None)


def test_what_was_not_used_for_long_goes(home: Path) -> None:
    old = build.library(lambda line: None)
    os.utime(old, (0, 0))
    (build.SOURCES / "deep.h").write_text("// 2\n")
    assert build.library(lambda line: None).exists()
    assert not old.exists()


def test_what_is_no_library_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_text("text")
    with pytest.raises(LibraryError, match="do not load"):
        library.Library(tmp_path / "x.so")


def test_kernels_share_no_function_between_instruction_sets() -> None:
    """A weak symbol is kept once by the linker, from any of the files: it could be one that this host cannot run."""
    build.library(testing=True)
    for unit in build.SOURCES.glob("isa_*.cpp"):
        objects = sorted(
            (build.cache_dir() / "objects").glob(f"{unit.stem}-*.o"), key=lambda path: path.stat().st_mtime
        )
        if not objects:
            continue
        symbols = subprocess.run(["nm", "-C", str(objects[-1])], capture_output=True, text=True, check=True).stdout
        isa = unit.stem.removeprefix("isa_")
        assert f"pw::{isa}::" in symbols
        weak = [line for line in symbols.splitlines() if " W " in line or " V " in line or " u " in line]
        assert [line for line in weak if f"pw::{isa}::" not in line and "DW.ref" not in line] == []


def test_the_source_digest_is_of_sources_and_flags(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.source_digest()
    build.source_digest.cache_clear()
    assert build.source_digest() == first
    for change in (
        lambda: (build.SOURCES / "deep.h").write_text("// 3\n"),
        lambda: monkeypatch.setattr(build, "FLAGS", ("-O0",)),
    ):
        change()
        build.source_digest.cache_clear()
        assert build.source_digest() != first
        first = build.source_digest()


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_kernels_pass_their_tests_under_the_sanitizers() -> None:
    """Addresses and undefined behaviour; in processes of their own, since the sanitizer must be loaded first."""
    build.library(sanitize=True, testing=True)
    names = sorted(path for path in Path(__file__).parent.glob("test_*.py") if path.name != "test_build.py")
    for name in names:  # one by one: a process that is killed by a sanitizer says in which
        arguments = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(name)]
        environment = {**os.environ, **build.sanitizer_environment(), "PAGEWIRE_TEST_SANITIZE": "1"}
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{name.name}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
