"""What the two clients share: the public messages, how a channel is set up, how a request is put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pagewire.v1.admin_pb2 import GetStatsResponse
from pagewire.v1.inference_pb2 import (
    ChatMessage,
    ChatMessages,
    FinishReason,
    GenerateDelta,
    GenerateFinished,
    GenerateRequest,
    GenerateResponse,
    GetModelResponse,
    SamplingParams,
    TokenIds,
)

__all__ = [
    "DEFAULT_ADDRESS",
    "ChatMessage",
    "ChatMessages",
    "Chunk",
    "FinishReason",
    "GenerateDelta",
    "GenerateFinished",
    "GetModelResponse",
    "GetStatsResponse",
    "Prompt",
    "SamplingParams",
    "TokenIds",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 << 20

# Text, token ids, or a conversation.
Prompt = str | TokenIds | Sequence[ChatMessage]
# Some of a stream's output, or its end: one for each index, as its last.
Chunk = GenerateDelta | GenerateFinished


def channel_options(keepalive_seconds: float) -> list[tuple[str, int]]:
    """A silent stream's connection is pinged this often, so that a dead host is noticed; an idle one is left alone."""
    return [
        ("grpc.keepalive_time_ms", int(keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


def generate_request(
    prompt: Prompt, sampling: SamplingParams | None, request_id: str, priority: int, cache_salt: str
) -> GenerateRequest:
    request = GenerateRequest(request_id=request_id, sampling=sampling, priority=priority, cache_salt=cache_salt)
    match prompt:
        case str():
            request.text = prompt
        case TokenIds():
            request.token_ids.CopyFrom(prompt)
        case _:
            request.chat.messages.extend(prompt)
    return request


def chunk(response: GenerateResponse) -> Chunk:
    return response.delta if response.HasField("delta") else response.finished


def metadata(pairs: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """What the server says about a stream before its first token, binary entries left out."""
    return {key: value for key, value in pairs or () if isinstance(value, str)}
