"""Compiles csrc/ with the host's C++ compiler, once for each state of the sources, and says where the library is.

    python -m kernels.cpu.build               into the user's cache, as the first use would
    python -m kernels.cpu.build --into-package  beside this file, for a wheel or an image whose host has no compiler
    python -m kernels.cpu.build --sanitize    with the address and undefined-behaviour sanitizers, for tests

A library is named by a digest of sources and flags, then one of those and the compiler, and appears under its name
whole, by a rename. Where there is no compiler, one that any compiler made of the same sources and flags serves.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "csrc"
PREBUILT: Final = Path(__file__).parent / "prebuilt"
COMPILERS: Final = ("g++", "clang++", "c++")
UNUSED_DAYS: Final = 14  # after which a cached file goes

WARNINGS: Final = ("-Wall", "-Wextra", "-Wno-psabi")
# No contraction: the bits of a product and a sum are those that the sources say (vec.h).
FLAGS: Final = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-pthread",
    *WARNINGS,
)
SANITIZE: Final = ("-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
_AVX2: Final = ("-mavx2", "-mfma", "-mf16c")
_AVX512: Final = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
)
ISA_FLAGS: Final = {
    "isa_generic": (),
    "isa_avx2": _AVX2,
    "isa_avx512_vnni": _AVX512,
    "isa_avx512_bf16": (*_AVX512, "-mavx512bf16"),
}

Say = Callable[[str], None]


class LibraryError(Exception):
    """The library cannot be built or opened here, in one line for the person who started it."""


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def library(say: Say = say_on_stderr, *, sanitize: bool = False, testing: bool = False) -> Path:
    """The library for the sources as they are, compiled if it has to be. Raises LibraryError.

    `testing` adds test_*.cpp, through which tests reach each kernel.
    """
    plain = not sanitize and not testing
    if plain and (prebuilt := PREBUILT / _prebuilt_name()).exists():
        return prebuilt
    build = _Build(cache_dir(), sanitize=sanitize, testing=testing)
    try:
        compiler = find_compiler()
    except LibraryError:
        if found := build.newest():
            return found
        raise
    try:
        return build.library(compiler, say)
    except OSError as error:
        raise LibraryError(f"the CPU kernels cannot be compiled into {build.cache}: {error}") from error


def into_package(say: Say = say_on_stderr) -> Path:
    """Compiles and leaves the library in the package, where `library` finds it without a compiler."""
    built = _Build(cache_dir(), sanitize=False, testing=False).library(find_compiler(), say)
    PREBUILT.mkdir(exist_ok=True)
    for old in PREBUILT.glob("*.so"):
        old.unlink()
    return Path(shutil.copy2(built, PREBUILT / _prebuilt_name()))


@functools.cache
def source_digest() -> str:
    """Of everything that decides the arithmetic: the sources and the flags they are compiled with."""
    digest = hashlib.blake2b(repr((FLAGS, sorted(ISA_FLAGS.items()))).encode(), digest_size=16)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_dir() -> Path:
    return Path(os.environ.get("PAGEWIRE_HOME") or "~/.cache/pagewire").expanduser() / "kernels"


def find_compiler() -> list[str]:
    """The words that begin a compiler's command line: $CXX, or the first that there is. Raises LibraryError."""
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]):
            return given
        raise LibraryError(f"the C++ compiler that CXX names is not there: {given[0]!r}")
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise LibraryError(
        "the CPU kernels need a C++ compiler once, and there is none: install g++ (Debian, Ubuntu: apt install g++; "
        "Fedora: dnf install gcc-c++; Alpine: apk add g++) or clang++, or name one in CXX"
    )


def sanitizer_environment() -> dict[str, str]:
    """What a process needs that loads a library with the sanitizers: they come before all else, and with libstdc++,
    or the first exception ends it. Python's own leaks are not ours.
    """
    found = [
        subprocess.run([*find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {"LD_PRELOAD": ":".join(result.stdout.strip() for result in found), "ASAN_OPTIONS": "detect_leaks=0"}


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _prebuilt_name() -> str:
    return f"pagewire-cpu-{source_digest()}-{platform.machine()}.so"


class _Build:
    """One set of flags, one cache."""

    def __init__(self, cache: Path, *, sanitize: bool, testing: bool) -> None:
        self.cache = cache
        self.optimize = (*SANITIZE, "-O1") if sanitize else ("-O3",)
        self.units = [
            path
            for path in sorted(SOURCES.glob("*.cpp"))
            if (testing or not path.stem.startswith("test_")) and (is_x86() or not path.stem.startswith("isa_a"))
        ]
        self._prefix = f"pagewire-cpu-{_digest_of(_platform(), *map(self._digest, self.units))}-"

    def newest(self) -> Path | None:
        """What any compiler made of these sources with these flags, last made or used."""
        found = sorted(self.cache.glob(f"{self._prefix}*.so"), key=_used)
        if not found:
            return None
        _touch(found[-1])
        return found[-1]

    def library(self, compiler: list[str], say: Say) -> Path:
        identity = _identity(compiler)
        objects = {
            unit: self.cache / "objects" / f"{unit.stem}-{_digest_of(identity, self._digest(unit))}.o"
            for unit in self.units
        }
        library = self.cache / f"{self._prefix}{_digest_of(*(path.name for path in objects.values()))}.so"
        if library.exists():
            _touch(library)
            return library
        (self.cache / "objects").mkdir(parents=True, exist_ok=True)
        with _locked(self.cache / "lock"):  # whoever comes second finds it done
            if not library.exists():
                self._make(compiler, library, objects, say)
        return library

    def _make(self, compiler: list[str], library: Path, objects: dict[Path, Path], say: Say) -> None:
        for left in self.cache.glob("tmp*"):  # by one that was killed: who holds the lock is alone
            shutil.rmtree(left, ignore_errors=True)
        missing = {unit: path for unit, path in objects.items() if not path.exists()}
        say(f"pagewire: compiling the CPU kernels with {compiler[0]} ({len(missing)} files), once")
        with tempfile.TemporaryDirectory(dir=self.cache) as temporary:
            workers = len(os.sched_getaffinity(0))
            # The longest first: the last to end is a short one.
            order = sorted(missing, key=lambda unit: -len(self._flags(unit)))
            with ThreadPoolExecutor(workers) as pool:
                compiles = [
                    pool.submit(_run, compiler, [*self._flags(unit), "-c", str(unit)], missing[unit], Path(temporary))
                    for unit in order
                ]
                for done in compiles:
                    done.result()
            links = [*self.optimize, "-shared", "-pthread", *map(str, objects.values())]
            _run(compiler, links, library, Path(temporary))
        for path in objects.values():
            _touch(path)
        _sweep(self.cache)

    def _flags(self, unit: Path) -> list[str]:
        exceptions = ["-fno-exceptions"] if unit.stem in ISA_FLAGS else []
        return [*FLAGS, *self.optimize, *exceptions, *ISA_FLAGS.get(unit.stem, ())]

    def _digest(self, unit: Path) -> str:
        """Of all that the compiler is told."""
        texts = (f"{path.name}\0{path.read_text()}" for path in _with_includes(unit))
        return _digest_of(unit.stem, *self._flags(unit), *texts)


def _run(compiler: list[str], arguments: list[str], to: Path, temporary: Path) -> None:
    """Makes `to`, which appears whole. Raises LibraryError."""
    made = temporary / to.name
    result = subprocess.run([*compiler, *arguments, "-o", str(made)], capture_output=True, text=True, check=False)
    reason = ""
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        reason = errors[0] if errors else f"exit status {result.returncode}"
    elif not made.exists():
        reason = "it ends without an error, and without the file that it was to write"
    if reason:
        raise LibraryError(f"the CPU kernels do not compile with {shlex.join(compiler)}: {reason}")
    made.rename(to)


def _with_includes(unit: Path) -> list[Path]:
    """A source and all of ours that it includes."""
    found = [unit]
    for path in found:
        names: list[str] = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
        found += [SOURCES / name for name in names if (SOURCES / name).exists() and SOURCES / name not in found]
    return found


def _identity(compiler: list[str]) -> str:
    """Another compiler, or another version of it, has another one; so has another C library."""
    path = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    stat = path.stat()
    return f"{compiler} {path} {stat.st_size} {stat.st_mtime_ns} {_platform()}"


def _platform() -> str:
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else ""
    return f"{libc} {platform.machine()}"


def _digest_of(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has swept it
        return 0.0


def _touch(path: Path) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written to serves as well
        path.touch()


def _sweep(cache: Path) -> None:
    """Removes what has not been used for long."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for path in [*cache.glob("*.so"), *(cache / "objects").glob("*.o")]:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.cpu.build", description="Compile the CPU kernels.")
    parser.add_argument("--sanitize", action="store_true", help="with the address and UB sanitizers, for tests")
    parser.add_argument("--into-package", action="store_true", help="for a wheel or an image")
    arguments = parser.parse_args()
    try:
        if arguments.into_package:
            path = into_package()
        else:
            path = library(sanitize=arguments.sanitize, testing=arguments.sanitize)
    except LibraryError as error:
        sys.exit(f"pagewire: {error}")
    print(path)
    if arguments.sanitize:
        print("to run with:", *(f"{name}={value}" for name, value in sanitizer_environment().items()))


if __name__ == "__main__":
    main()
