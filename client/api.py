"""What the two clients share: the public messages, how a channel is set up, how a request is put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pagewire.v1.admin_pb2 import Adapter, GetStatsResponse
from pagewire.v1.inference_pb2 import (
    ChatMessage,
    ChatMessages,
    Choice,
    EmbedInput,
    EmbedRequest,
    EmbedResponse,
    FinishReason,
    GenerateDelta,
    GenerateFinished,
    GenerateRequest,
    GenerateResponse,
    GetModelResponse,
    Pooling,
    SamplingParams,
    ScoreCandidate,
    ScoreRequest,
    ScoreResponse,
    StructuredOutput,
    TokenIds,
    Tool,
    ToolCall,
)

from client.retry import Resume, Retry

__all__ = [
    "DEFAULT_ADDRESS",
    "Adapter",
    "ChatMessage",
    "ChatMessages",
    "Choice",
    "Chunk",
    "EmbedResponse",
    "FinishReason",
    "GenerateDelta",
    "GenerateFinished",
    "GetModelResponse",
    "GetStatsResponse",
    "Keepalive",
    "Pooling",
    "Prompt",
    "Resume",
    "Retry",
    "SamplingParams",
    "ScoreResponse",
    "StructuredOutput",
    "TokenIds",
    "Tool",
    "ToolCall",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 << 20
LEAST_KEEPALIVE, MOST_KEEPALIVE = 10, 86_400  # seconds; a Pagewire server allows a ping every 10 s

# Text, token ids, or a conversation.
Prompt = str | TokenIds | Sequence[ChatMessage] | ChatMessages  # the last one with tools
# Some of a stream's output, or its end: one for each index, as its last.
Chunk = GenerateDelta | GenerateFinished


@dataclass(frozen=True)
class Keepalive:
    """How a dead host is told from a silent stream: by HTTP/2 pings, as long as a call is open."""

    seconds: float = 30.0  # between pings
    timeout: float = 10.0  # for the answer to one: without it every call on the connection ends with UNAVAILABLE
    idle: bool = False  # pings without any call open as well, so that a balancer keeps the connection

    def __post_init__(self) -> None:
        if not LEAST_KEEPALIVE <= self.seconds <= MOST_KEEPALIVE:
            limits = (
                f"{LEAST_KEEPALIVE} to {MOST_KEEPALIVE}: a server closes the connection of whoever pings more often"
            )
            raise ValueError(f"keepalive seconds is {self.seconds:g}: must be from {limits}")
        if not 0 < self.timeout <= MOST_KEEPALIVE:
            raise ValueError(f"keepalive timeout is {self.timeout:g}: must be over 0 and at most {MOST_KEEPALIVE} s")


def addresses(given: str | Sequence[str]) -> tuple[str, ...]:
    """One or several. Raises ValueError where there is none."""
    several = (given,) if isinstance(given, str) else tuple(given)
    if not several or not all(several):
        raise ValueError(f"address is {given!r}: must be HOST:PORT, or several of them")
    return several


def channel_options(keepalive: Keepalive | None) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A server that comes back is found within seconds; gRPC's own backoff grows to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
    ]
    if keepalive:
        options += [
            ("grpc.keepalive_time_ms", int(keepalive.seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(keepalive.timeout * 1000)),
            ("grpc.keepalive_permit_without_calls", int(keepalive.idle)),
            # Alone, keepalive_timeout left a dead host unnoticed for another minute: pings have a time of their own.
            ("grpc.http2.ping_timeout_ms", int(keepalive.timeout * 1000)),
            ("grpc.http2.max_pings_without_data", 0),  # no limit: a queued stream is silent for as long as it waits
        ]
    return options


def generate_request(
    prompt: Prompt,
    sampling: SamplingParams | None,
    request_id: str,
    priority: int,
    cache_salt: str,
    adapter: str = "",
    structured_output: StructuredOutput | None = None,
) -> GenerateRequest:
    request = GenerateRequest(
        request_id=request_id,
        sampling=sampling,
        priority=priority,
        cache_salt=cache_salt,
        adapter=adapter,
        structured_output=structured_output,
    )
    _set_prompt(request, prompt)
    return request


def embed_request(
    inputs: Sequence[Prompt],
    pooling: str,
    dimensions: int | None,
    normalize: bool | None,
    truncate_prompt_tokens: int | None,
    **identity: Any,
) -> EmbedRequest:
    """`pooling`: last, mean or cls; empty for the model's own. Raises ValueError for another."""
    request = EmbedRequest(
        pooling=f"POOLING_{pooling.upper()}" if pooling else None,
        dimensions=dimensions,
        normalize=normalize,
        truncate_prompt_tokens=truncate_prompt_tokens,
        **identity,
    )
    for prompt in inputs:
        _set_prompt(request.inputs.add(), prompt)
    return request


def score_request(prompt: Prompt, candidates: Sequence[str | TokenIds], **identity: Any) -> ScoreRequest:
    request = ScoreRequest(**identity)
    _set_prompt(request, prompt)
    for candidate in candidates:
        match candidate:
            case str():
                request.candidates.append(ScoreCandidate(text=candidate))
            case _:
                request.candidates.append(ScoreCandidate(token_ids=candidate))
    return request


def _set_prompt(request: GenerateRequest | EmbedInput | ScoreRequest, prompt: Prompt) -> None:
    match prompt:
        case str():
            request.text = prompt
        case TokenIds():
            request.token_ids.CopyFrom(prompt)
        case ChatMessages():
            request.chat.CopyFrom(prompt)
        case _:
            request.chat.messages.extend(prompt)


def chunk(response: GenerateResponse) -> Chunk:
    return response.delta if response.HasField("delta") else response.finished


def told(request: GenerateRequest, metadata: dict[str, str]) -> None:
    """Makes a repeated request keep the id and the seed that its caller has been told."""
    request.request_id = metadata.get("request-id", request.request_id)
    if "seed" in metadata:
        request.sampling.seed = int(metadata["seed"])


def metadata(pairs: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """What the server says about a stream before its first token, binary entries left out."""
    return {key: value for key, value in pairs or () if isinstance(value, str)}
