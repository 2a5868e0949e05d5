"""A whole service behind TLS and tokens, and the command line in front of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.e2e.service import ROOT

CLI = [sys.executable, "-m", "client.cli"]


def pagewire(*arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PAGEWIRE_TOKEN": token}
    return subprocess.run(
        [*CLI, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """The address from its ready line."""
    command = [sys.executable, "-m", "scheduler_svc", "fake:", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if ready := re.search(r"ready: .* at ([^ ,]+)[ ,]", line):
                yield ready[1]
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("frontends", [1, 2])
def test_a_service_behind_tls_and_tokens(frontends: int, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server, caller = authority.certify("server"), authority.certify("caller")
    tokens, mine = tmp_path / "tokens.toml", tmp_path / "mine"
    made = pagewire("token", "new", "search", "--token-file", str(mine))
    operators = pagewire("token", "new", "operators", "--admin")
    assert (made.returncode, operators.returncode) == (0, 0), made.stderr + operators.stderr
    tokens.write_text(made.stdout + operators.stdout)
    assert mine.stat().st_mode & 0o777 == 0o600
    assert mine.read_text().strip() not in tokens.read_text()
    admin = operators.stderr.split()[-1]
    files = ["--tls-cert", str(server.certificate), "--tls-key", str(server.key), "--tls-client-ca"]
    files += [str(authority.file), "--tokens", str(tokens), "--frontends", str(frontends)]
    with serving(*files) as address:
        reach = ["--address", address, "--tls-ca", str(authority.file)]
        shown = [*reach, "--tls-cert", str(caller.certificate), "--tls-key", str(caller.key)]
        done = pagewire("generate", "hello", "--max-tokens", "3", *shown, "--token-file", str(mine))
        assert (done.returncode, done.stderr) == (0, "")
        assert pagewire("generate", "hello", "--max-tokens", "3", *shown, token=admin).returncode == 0
        for arguments, words in (
            (shown, "UNAUTHENTICATED"),
            ([*shown, "--token-file", str(mine), "--tenant", "other"], "PERMISSION_DENIED"),
            (reach, "UNAVAILABLE"),
            (["--address", address], "UNAVAILABLE"),
        ):
            done = pagewire("generate", "hello", *arguments)
            assert done.returncode == 1
            assert words in done.stderr
            assert done.stderr.count("\n") == 1


def test_files_that_cannot_serve_end_the_start(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text("[token]\nx = 1\n")
    for flags, words in (
        (["--tokens", str(tokens)], "token.x is 1: must be a table"),
        (["--tls-cert", "/none/a.pem", "--tls-key", "/none/a.key"], "/none/a.pem: No such file"),
        (["--workers", "0", "--listen", f"ipc://{tmp_path}/none/workers"], "No such file"),
    ):
        command = [sys.executable, "-m", "scheduler_svc", "fake:", "--port", "0", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert words in done.stderr


def test_a_pair_of_keys_for_another_host(tmp_path: Path) -> None:
    done = pagewire("keys", "new", str(tmp_path / "keys"))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "keys/worker.pub") in done.stdout
    assert (tmp_path / "keys/worker.key").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "keys/scheduler.key").exists()


def test_a_token_is_not_written_over_another(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one")
    done = pagewire("token", "new", "search", "--token-file", str(file))
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert done.stdout == ""
    assert file.read_text() == "one"
    done = pagewire("token", "new", "é")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
