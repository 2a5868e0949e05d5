"""Bytes ↔ messages, one encoder and one decoder a direction. Nothing else on the wire: no pickle, ever."""

from __future__ import annotations

import msgspec

from protos.engine_wire import ToEngine, ToFrontend
from protos.wire import FromWorker, ToWorker, Wire

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_frontend: msgspec.msgpack.Decoder[ToFrontend] = msgspec.msgpack.Decoder(ToFrontend)

# All that foreign bytes can raise: msgspec's own (ValidationError is one) and two that it passes on.
DecodeError = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(message: Wire) -> bytes:
    return _encoder.encode(message)


def decode_to_worker(data: bytes) -> ToWorker:
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
    return _from_worker.decode(data)


def decode_to_engine(data: bytes) -> ToEngine:
    return _to_engine.decode(data)


def decode_to_frontend(data: bytes) -> ToFrontend:
    return _to_frontend.decode(data)
