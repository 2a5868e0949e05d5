"""TLS and mTLS on a real port, with real certificates, and files that change meanwhile."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from client import aio
from client.channel import Tls
from client.errors import UnavailableError
from scheduler_svc.frontend.core import FrontendConfig
from scheduler_svc.frontend.reloading import FileError
from scheduler_svc.frontend.tls import Certificates, TlsFiles, is_loopback
from tests.certificates import Authority, Pem, common_name
from tests.frontend.conftest import Service, byte_model, open_service


@asynccontextmanager
async def serving(files: TlsFiles | None, **changes: object) -> AsyncIterator[Service]:
    opened = await open_service(byte_model(), FrontendConfig(port=0, tls=files, **changes))  # type: ignore[arg-type]
    try:
        yield opened
    finally:
        await opened.channel.close()
        await opened.frontend.stop()


async def text(service: Service, tls: Tls | None) -> str:
    from client.api import GenerateDelta, SamplingParams

    sampling = SamplingParams(max_tokens=3, seed=0)
    async with aio.Client(f"127.0.0.1:{service.port}", tls=tls) as client, client.generate("hello", sampling) as stream:
        return "".join([chunk.text async for chunk in stream if isinstance(chunk, GenerateDelta)])


async def greeting(service: Service) -> str:
    """The name in the certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", service.port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert shown
    return common_name(shown)


def replace(pem: Pem, other: Pem) -> None:
    """One file after the other, each at once, as operators' tools do."""
    for old, new in ((pem.certificate, other.certificate), (pem.key, other.key)):
        copy = old.with_suffix(".new")
        copy.write_bytes(new.read_bytes())
        copy.replace(old)


async def test_a_client_that_trusts_the_authority_is_served(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    pem = authority.certify("server")
    async with serving(TlsFiles(pem.certificate, pem.key)) as service:
        assert await text(service, Tls(authority.file)) == "fgh"
        with pytest.raises(UnavailableError, match="no TLS connection"):
            await text(service, Tls(stranger.file))
        with pytest.raises(UnavailableError):
            await text(service, None)


async def test_only_clients_of_the_authority_are_let_in(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    pem, known, unknown = authority.certify("server"), authority.certify("client"), stranger.certify("other")
    async with serving(TlsFiles(pem.certificate, pem.key, authority.file)) as service:
        assert await text(service, Tls(authority.file, known.certificate, known.key)) == "fgh"
        with pytest.raises(UnavailableError):
            await text(service, Tls(authority.file))
        with pytest.raises(UnavailableError):
            await text(service, Tls(authority.file, unknown.certificate, unknown.key))


async def test_new_files_are_taken_and_broken_ones_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    authority = Authority(tmp_path)
    pem, next_one, other = (authority.certify(name) for name in ("first", "second", "third"))
    async with (
        serving(TlsFiles(pem.certificate, pem.key)) as service,
        aio.Client(f"127.0.0.1:{service.port}", tls=Tls(authority.file)) as lasting,
    ):
        assert (await lasting.model()).name == "fake"
        assert await greeting(service) == "first"
        replace(pem, next_one)
        assert await greeting(service) == "second"
        pem.key.write_bytes(other.key.read_bytes())  # of another certificate
        for _ in range(3):
            assert await greeting(service) == "second"
        warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == 1
        assert f"{pem.key}: KEY VALUES MISMATCH" in warnings[0]
        pem.certificate.unlink()
        assert await greeting(service) == "second"
        replace(pem, other)
        assert await greeting(service) == "third"
        assert (await lasting.model()).name == "fake", "a connection that was there goes on"
        assert await text(service, Tls(authority.file)) == "fgh"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("missing", "none.pem: No such file or directory"),
        ("no pem", "no certificate or no key in PEM"),
        ("other key", "KEY VALUES MISMATCH"),
        ("pass phrase", "the key has a pass phrase"),
        ("client ca", "nothing.pem"),
    ],
)
def test_files_that_cannot_serve_are_one_line(what: str, words: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pem, other, locked = authority.certify("a"), authority.certify("b"), authority.certify("c", passphrase=b"secret")
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing\n")
    files = {
        "missing": TlsFiles(tmp_path / "none.pem", pem.key),
        "no pem": TlsFiles(nothing, pem.key),
        "other key": TlsFiles(pem.certificate, other.key),
        "pass phrase": TlsFiles(locked.certificate, locked.key),
        "client ca": TlsFiles(pem.certificate, pem.key, nothing),
    }[what]
    with pytest.raises(FileError) as caught:
        Certificates(files)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_the_port_for_routers_serves_them_alone_and_in_the_clear(tmp_path: Path) -> None:
    from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]
    from smg_grpc_proto.generated import vllm_engine_pb2_grpc

    pem = Authority(tmp_path).certify("server")
    files, tokens = TlsFiles(pem.certificate, pem.key), tmp_path / "tokens.toml"
    tokens.write_text("")
    async with serving(files, tokens=tokens, router_listen="127.0.0.1:0") as service:
        address = f"127.0.0.1:{service.frontend.router_port}"
        async with grpc.aio.insecure_channel(address) as channel:
            info = await vllm_engine_pb2_grpc.VllmEngineStub(channel).GetModelInfo(vllm.GetModelInfoRequest())
            assert info.vocab_size == 512
        async with aio.Client(address) as client:
            assert await client.serving()
            for call in (client.model, client.stats):
                with pytest.raises(Exception, match="UNIMPLEMENTED"):
                    await call()


@pytest.mark.parametrize("warns", [True, False])
async def test_plain_text_beyond_this_host_is_said(
    warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("scheduler_svc.frontend.server.is_loopback", lambda host: not warns)
    async with serving(None):
        lines = [record.getMessage() for record in caplog.records]
    assert lines == ["127.0.0.1 is served without TLS: whoever is on the way reads prompts and tokens"] * warns


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "example.org", "")))
