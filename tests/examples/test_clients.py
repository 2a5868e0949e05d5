"""The clients of other languages, built and run against a live service; and their runner, where something is amiss."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from client import store
from examples import __main__ as runner
from examples import live
from examples.clients import EXAMPLES, ClientError, Ghz, Load, call
from examples.toolchains import GO, JAVAC, SMG, missing
from tests.client.scripted import ScriptedServer

SUMMARIES = {"go": "7 ok, 0 skipped, 0 failed", "java": "7 ok, 0 skipped, 0 failed", "openai": "6 ok, 0 failed"}


@pytest.fixture(scope="module")
def served(model_path: Path) -> Iterator[tuple[str, str]]:
    """The address, and the URL of OpenAI's API where there can be one."""
    port = live.free_port()
    flags = () if SMG.missing() else ("--openai-port", str(port))
    with live.served([str(model_path)], (*runner.DOOR, *flags)) as address:
        yield address, f"http://127.0.0.1:{port}/v1" if flags else ""


@pytest.mark.timeout(900)  # the first time, everything is downloaded and compiled
@pytest.mark.parametrize(
    "name",
    [
        "go",
        "java",
        "openai",
        pytest.param("ghz", marks=pytest.mark.full),
        pytest.param("ghz-cancel", marks=pytest.mark.full),
    ],
)
def test_it_does_what_it_should_and_leaves_nothing_behind(
    name: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    example = EXAMPLES[name]
    if why := missing(example.tools):
        pytest.skip("; ".join(why))
    example.build()
    address, url = request.getfixturevalue("served")
    example.run(address, Load(overload=runner.OVERLOAD, openai=url))
    live.nothing_left(address)
    assert SUMMARIES.get(name, "") in capfd.readouterr().out


def _tool(directory: Path, name: str, script: str) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _not_installed(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def test_a_missing_toolchain_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _tool(tmp_path, "javac", "echo javac 17")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(metadata, "version", _not_installed)
    assert runner.main([]) == 1, "none ran"
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.strip().splitlines())
    assert list(lines) == list(EXAMPLES)
    assert lines["go"] == lines["ghz"] == "not run: no `go` on the PATH (the Go toolchain, 1.24 or newer)"
    assert lines["java"] == "not run: no `mvn` on the PATH (Maven, 3.8 or newer)"
    assert lines["openai"].startswith("not run: no package `smg` in this Python (")
    assert lines["openai"].endswith("; no package `openai` in this Python (the official client)")


def test_a_toolchain_may_be_too_old_or_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _tool(tmp_path, "go", r"printf '\033[1mgo version go1.19.8 linux/amd64\033[m\n'")
    assert GO.missing() == "`go` is 1.19.8 (the Go toolchain, 1.24 or newer is needed)"
    _tool(tmp_path, "go", "echo go version go1.24.0 linux/amd64")
    assert GO.missing() is None
    _tool(tmp_path, "javac", "exit 1")
    assert "says no version" in (JAVAC.missing() or "")


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["cobol"], ["--total", "0"]):
        with pytest.raises(SystemExit) as ended:
            runner.main(arguments)
        assert ended.value.code == 2
    assert "'cobol' is none of go, java, openai, ghz, ghz-cancel" in capsys.readouterr().err


@pytest.mark.parametrize(
    "statuses", ["[OK]   2 responses\n  [Unavailable]   1 responses", "[Unavailable]   3 responses"]
)
def test_ghz_is_believed_only_if_every_call_went_as_expected(
    statuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary"
    monkeypatch.setattr(Ghz, "program", _tool(tmp_path, "ghz", f'cat "{summary}"'))
    summary.write_text("Summary:\n  Count:\t3\n\nStatus code distribution:\n  [OK]   3 responses\n")
    Ghz("generate.json", "OK").run("nowhere:1", Load())
    summary.write_text(f"Summary:\n  Count:\t3\n\nStatus code distribution:\n  {statuses}\n")
    with pytest.raises(ClientError, match="not every call ended with OK"):
        Ghz("generate.json", "OK").run("nowhere:1", Load())


def test_a_command_that_fails_or_hangs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="ended with 3"):
        call(["sh", "-c", "exit 3"], tmp_path, 60)
    with pytest.raises(ClientError, match=r"has not ended after 0\.1 s"):
        call(["sleep", "60"], tmp_path, 0.1)


def test_openais_client_needs_to_be_told_where(server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    if why := missing(EXAMPLES["openai"].tools):
        pytest.skip("; ".join(why))
    assert runner.main(["openai", "--address", server.address]) == 1
    assert "--address needs --openai-url, too" in capsys.readouterr().out.splitlines()[-1]


def test_a_failed_client_fails_the_run(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Ghz, "program", _tool(tmp_path, "ghz", "exit 1"))
    monkeypatch.setattr(Ghz, "tools", ())
    assert runner.main(["ghz", "--address", server.address]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"{server.address}` ended with 1")


def test_what_a_client_left_behind_is_seen(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "QUIET_PATIENCE", 0.2)
    with pytest.raises(live.LiveError, match="still holds: running: 3"):
        live.nothing_left(server.address)


def test_a_service_that_does_not_start_is_one_line() -> None:
    with pytest.raises(live.LiveError, match="ended before it was ready"), live.served([store.__file__]):
        raise AssertionError("it served a Python file")
