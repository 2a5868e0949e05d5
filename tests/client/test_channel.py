"""What a client's calls carry, and which arguments make no client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from client import aio
from client.channel import AccessError, Tls, carried
from client.client import Client
from tests.client.scripted import ScriptedServer
from tests.client.test_cli import pagewire

WANTED = {"authorization": "Bearer pw_1", "tenant": "search"}


def _said(server: ScriptedServer) -> list[dict[str, str | bytes]]:
    return [{key: call[key] for key in WANTED if key in call} for call in server.metadata]


def test_every_call_carries_token_and_tenant(server: ScriptedServer) -> None:
    with Client(server.address, token="pw_1", tenant="search") as client:
        list(client.generate("one"))
        client.tokenize("one")
        assert client.model().name == "echo"
    assert _said(server) == [WANTED, WANTED]


async def test_of_the_asyncio_client_too(server: ScriptedServer) -> None:
    async with aio.Client(server.address, token="pw_1", tenant="search") as client:
        async for _ in client.generate("one"):
            pass
        await client.tokenize("one")
    assert _said(server) == [WANTED, WANTED]


def test_what_a_call_says_itself_stays(server: ScriptedServer) -> None:
    with Client(server.address, token="pw_1") as client:
        stub: Any = client.targets[0].channel.unary_unary("/pagewire.v1.InferenceService/Tokenize")
        stub(b"", metadata=(("traceparent", "00-1"),))
    assert server.metadata[0]["traceparent"] == "00-1"
    assert server.metadata[0]["authorization"] == "Bearer pw_1"


def test_without_them_nothing_is_carried(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        client.tokenize("one")
    assert _said(server) == [{}]


@pytest.mark.parametrize(("token", "tenant"), [("a\nb", ""), ("ä", ""), ("", " a"), ("a ", ""), ("", "\x7f")])
def test_what_metadata_cannot_hold_is_refused(token: str, tenant: str) -> None:
    with pytest.raises(AccessError, match="must be printable ASCII") as caught:
        carried(token, tenant)
    assert "ä" not in str(caught.value)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(AccessError, match="go together"):
        Tls(certificate=Path("a.pem"))


def test_the_command_line_reads_a_token_file_or_the_environment(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEWIRE_TOKEN", "of-the-environment")
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    for more in ([], ["--token-file", str(file), "--tenant", "search"]):
        assert pagewire("generate", "one", "--address", server.address, *more).returncode == 0
    said = [(call["authorization"], call.get("tenant")) for call in server.metadata]
    assert said == [("Bearer of-the-environment", None), ("Bearer of-the-file", "search")]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--tls-cert", "a.pem"], 2, "go together"),
        (["--token-file", "/none/token"], 1, "/none/token"),
        (["--tls-ca", "/none/ca.pem"], 1, "/none/ca.pem"),
        (["--tenant", "ä"], 2, "printable ASCII"),
    ],
)
def test_access_flags_that_do_not_work_are_one_line(
    server: ScriptedServer, flags: list[str], code: int, words: str
) -> None:
    done = pagewire("generate", "one", "--address", server.address, *flags)
    assert done.returncode == code
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
