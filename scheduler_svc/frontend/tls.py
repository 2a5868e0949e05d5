"""TLS of the gRPC port: the certificate, its key, and whose certificates clients must show."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grpc

from scheduler_svc.frontend.reloading import FileError, Reloaded


@dataclass(frozen=True)
class TlsFiles:
    """In PEM. With `client_ca`, only clients that show a certificate of that authority are let in (mTLS)."""

    certificate: Path  # the chain, the server's own first
    key: Path
    client_ca: Path | None = None


class Certificates:
    """Credentials whose files may change: a new connection is greeted with what they hold then, older ones go on.

    Raises FileError.
    """

    def __init__(self, files: TlsFiles) -> None:
        paths = [files.certificate, files.key, *([files.client_ca] if files.client_ca else [])]
        self._configuration = Reloaded[Any]("the certificate and its key", paths, lambda: _load(files))
        refresh: Any = self._configuration.refresh  # gRPC calls it for every new connection; None: no change
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration.get(), refresh, require_client_authentication=files.client_ca is not None
        )


def is_loopback(host: str) -> bool:
    """Whether only this host can reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _load(files: TlsFiles) -> Any:
    certificate, key = _read(files.certificate), _read(files.key)
    authority = _read(files.client_ca) if files.client_ca else None
    _check(files, certificate, key, authority)
    return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error


def _check(files: TlsFiles, certificate: bytes, key: bytes, authority: bytes | None) -> None:
    """By OpenSSL, which says what is wrong: gRPC takes a key of another certificate, and fails every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with _as_file(certificate) as certificate_file, _as_file(key) as key_file:
            context.load_cert_chain(certificate_file, key_file, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise FileError(f"{files.certificate} and {files.key}: {_reason(error)}") from error
    if authority is None:
        return
    try:
        context.load_verify_locations(cadata=authority.decode("ascii"))
    except (OSError, ValueError) as error:
        raise FileError(f"{files.client_ca}: {_reason(error)}") from error


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """The very bytes that gRPC gets, under a name, which is all that OpenSSL takes: the file may change meanwhile."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _no_password() -> NoReturn:
    raise ValueError("the key has a pass phrase; give one without, readable by this service alone")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):  # where it gives no reason, it says no more than "PEM lib"
        return (error.reason or "no certificate or no key in PEM").replace("_", " ")
    return " ".join(str(error).split()) or type(error).__name__
