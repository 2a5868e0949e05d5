"""How a client reaches the service: in the clear or by TLS, and with what every call says of its caller.

Client("host:50051", tls=Tls(ca=Path("ca.pem")), token="pw_…")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio

from client import api

Pairs = tuple[tuple[str, str], ...]


class AccessError(ValueError):
    """Arguments that do not go together, or that no call could carry."""


@dataclass(frozen=True)
class Tls:
    """Files in PEM. Without `ca`, the server's certificate must be of an authority that gRPC knows."""

    ca: Path | None = None
    certificate: Path | None = None  # shown to the server, where it wants to see one (mTLS)
    key: Path | None = None
    server_name: str = ""  # the name that the server's certificate must bear, where it is not the address's

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise AccessError("certificate and key of TLS go together")

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError."""
        ca, key, certificate = (path.read_bytes() if path else None for path in (self.ca, self.key, self.certificate))
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def options(self) -> list[tuple[str, Any]]:
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def carried(token: str, tenant: str) -> Pairs:
    """Metadata of every call. Raises AccessError for what metadata cannot hold; the token itself is not repeated."""
    for name, value in (("token", token), ("tenant", tenant)):
        if not (value.isascii() and value.isprintable()) or value != value.strip():
            raise AccessError(f"the {name} must be printable ASCII, without spaces around it")
    pairs = (("authorization", f"Bearer {token}" if token else ""), ("tenant", tenant))
    return tuple((key, value) for key, value in pairs if value)


def open_sync(address: str, keepalive: api.Keepalive | None, tls: Tls | None, pairs: Pairs) -> grpc.Channel:
    options = api.channel_options(keepalive)
    if tls:
        plain = grpc.secure_channel(address, tls.credentials(), [*options, *tls.options()])
    else:
        plain = grpc.insecure_channel(address, options)
    return cast(grpc.Channel, _Carrying(plain, pairs)) if pairs else plain


def open_aio(address: str, keepalive: api.Keepalive | None, tls: Tls | None, pairs: Pairs) -> grpc.aio.Channel:
    options = api.channel_options(keepalive)
    if tls:
        plain = grpc.aio.secure_channel(address, tls.credentials(), [*options, *tls.options()])
    else:
        plain = grpc.aio.insecure_channel(address, options)
    return cast(grpc.aio.Channel, _Carrying(plain, pairs)) if pairs else plain


class _Carrying:
    """A channel of either kind whose calls carry `pairs`, besides what each says itself.

    Not by gRPC's interceptors, which take four classes for it, and whose calls of grpc.aio differ from plain ones.
    """

    def __init__(self, channel: Any, pairs: Pairs) -> None:
        self._channel, self._pairs = channel, pairs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return found
        return lambda *arguments, **options: self._with_pairs(found(*arguments, **options))

    def _with_pairs(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, metadata: Any = None, **options: Any) -> Any:
            return method(*arguments, metadata=(*self._pairs, *(metadata or ())), **options)

        return call
