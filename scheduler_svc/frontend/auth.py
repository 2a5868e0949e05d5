"""Who calls: bearer tokens, one tenant each. `pagewire token new TENANT` makes them, and the lines of this file:

[token.k3v9x2ab]
tenant = "search"
hash = "…"       # BLAKE2b of the whole token
admin = true     # may call AdminService, and whatever else is the operator's; false if not given

A token is `pw_`, its id, and 256 random bits. So a fast hash is enough: there is nothing to guess, and nobody's pass
phrase can be one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from pagewire.v1 import admin_pb2
from smg_grpc_proto.generated import vllm_engine_pb2  # type: ignore[import-untyped]

from scheduler_svc.frontend.errors import Context, ServiceError, denied, unauthenticated
from scheduler_svc.frontend.limits import MAX_TENANT_BYTES
from scheduler_svc.frontend.reloading import FileError, Reloaded

TENANT_KEY: Final = "tenant"  # of the metadata
TOKEN: Final = re.compile(r"pw_([a-z2-7]{8})_[A-Za-z0-9_-]{43}")
_ID: Final = re.compile(r"[a-z2-7]{8}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = ("tenant", "hash", "admin")

_VLLM: Final = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name
OPEN: Final = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"  # probes carry no token
OPERATORS: Final = (
    f"/{admin_pb2.DESCRIPTOR.services_by_name['AdminService'].full_name}/",
    "/grpc.channelz.",  # names every peer
    # What they do or tell concerns every tenant.
    *(f"/{_VLLM}/{method}" for method in ("FlushCache", "StartProfile", "StopProfile", "SubscribeKvEvents")),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Whose token a call carries."""

    tenant: str
    admin: bool
    hash: bytes = field(repr=False)


_identity: ContextVar[Identity | None] = ContextVar("identity", default=None)


def identity() -> Identity | None:
    """Of the call that is being handled; None where nobody is asked for a token."""
    return _identity.get()


def digest(token: str) -> bytes:
    return hashlib.blake2b(token.encode(), digest_size=32, person=b"pagewire token").digest()


def new_token(tenant: str, admin: bool) -> tuple[str, str]:
    """A token, and its lines for the file. Raises ValueError for a tenant that no call could name."""
    check_tenant("tenant", tenant)
    token_id = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz234567") for _ in range(8))
    token = f"pw_{token_id}_{secrets.token_urlsafe(32)}"
    quoted = tenant.replace("\\", "\\\\").replace('"', '\\"')
    lines = [f"[token.{token_id}]", f'tenant = "{quoted}"', f'hash = "{digest(token).hex()}"']
    return token, "\n".join([*lines, *(["admin = true"] if admin else []), ""])


class TokenFile:
    """Raises FileError where it cannot be used at first; later on, the last good content stays."""

    def __init__(self, path: Path) -> None:
        self._tokens = Reloaded(f"tokens of {path}", [path], lambda: _load(path))

    def find(self, token: str) -> Identity | None:
        """In constant time, as far as the secret goes: a stranger may learn that an id exists, and nothing else."""
        match = TOKEN.fullmatch(token)
        known = self._tokens.get().get(match[1]) if match else None
        same = hmac.compare_digest(digest(token), known.hash if known else bytes(32))
        return known if same else None


class Guard(grpc.aio.ServerInterceptor):
    """Lets nothing through without a token, whatever service it is for, but for health."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens
        self._refused = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        path = handler_call_details.method
        if not path.startswith(OPEN):
            try:  # the handler runs in this call's own context
                _identity.set(self._admit(path, handler_call_details.invocation_metadata))
            except ServiceError as refusal:
                self._count(refusal)
                return _refusing(refusal)
        return await continuation(handler_call_details)

    def _admit(self, path: str, metadata: Any) -> Identity:
        """Raises ServiceError UNAUTHENTICATED or PERMISSION_DENIED."""
        given = [value for key, value in metadata or () if key == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str):
            raise unauthenticated("TOKEN_MISSING", f"{len(given)} values of metadata authorization; 1 is needed")
        scheme, _, token = given[0].partition(" ")
        if scheme.lower() != "bearer":
            raise unauthenticated("TOKEN_MISSING", "metadata authorization must be: Bearer TOKEN")
        known = self._tokens.find(token)
        if known is None:
            raise unauthenticated("TOKEN_UNKNOWN", "the token is not known here")
        for key, value in metadata:
            if key == TENANT_KEY and value != known.tenant:
                raise denied("TENANT_CONTRADICTED", "metadata tenant is not the tenant of the token; leave it out")
        if path.startswith(OPERATORS) and not known.admin:
            raise denied("ADMIN_NEEDED", f"{path!r} needs an admin token")
        return known

    def _count(self, refusal: ServiceError) -> None:
        self._refused += 1
        if self._refused.bit_count() == 1:  # the 1st, 2nd, 4th, 8th … so that nobody fills a disk
            log.warning("a call was refused: %s (%d so far)", refusal.message, self._refused)


def _refusing(refusal: ServiceError) -> grpc.RpcMethodHandler[Any, Any]:
    """For a method of any kind: it reads nothing of what the caller sends."""

    async def refuse(requests: object, context: Context) -> None:
        await refusal.abort(context)

    return grpc.stream_stream_rpc_method_handler(refuse)


def check_tenant(where: str, tenant: object) -> str:
    """Raises ValueError for what metadata could not carry."""
    if not isinstance(tenant, str) or not tenant or len(tenant) > MAX_TENANT_BYTES:
        raise ValueError(f"{where} is {tenant!r}: must be a string of 1 to {MAX_TENANT_BYTES} characters")
    if not (tenant.isascii() and tenant.isprintable()):
        raise ValueError(f"{where} is {tenant!r}: must be printable ASCII")
    return tenant


def _load(path: Path) -> dict[str, Identity]:
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(f"{path}: {error}") from error
    try:
        if unknown := next((key for key in tree if key != "token"), None):
            raise ValueError(f"it has {unknown!r}: known is token alone")
        return {name: _entry(name, table) for name, table in _table("token", tree.get("token", {})).items()}
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error


def _entry(name: str, value: object) -> Identity:
    where, table = f"token.{name}", _table(f"token.{name}", value)
    if not _ID.fullmatch(name):
        raise ValueError(f"{where}: an id has 8 characters of a-z and 2-7")
    if unknown := next((key for key in table if key not in _FIELDS), None):
        raise ValueError(f"{where} has {unknown!r}: known are {', '.join(_FIELDS)}")
    admin, hexadecimal = table.get("admin", False), table.get("hash")
    if not isinstance(admin, bool):
        raise ValueError(f"{where}.admin is {admin!r}: must be true or false")
    if not isinstance(hexadecimal, str) or not _HASH.fullmatch(hexadecimal):
        raise ValueError(f"{where}.hash must be 64 hexadecimal digits")
    return Identity(check_tenant(f"{where}.tenant", table.get("tenant")), admin, bytes.fromhex(hexadecimal))


def _table(where: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: must be a table")
    return value
