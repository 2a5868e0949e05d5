"""A stream that broke goes on: what its client has of it, and whether this service may go on with it.

Text is a function of the ids: a message with ids brings all the text that they complete, less what may still become a
stop string or a whole character; the ids that end a stream bring the rest. So whoever names the ids that it has has the
text as well, and needs to be sent what comes behind it alone (`IndexStream.resume`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import grpc
from google.rpc import error_details_pb2
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason
from protos.wire import Ready, Sampling
from scheduler_svc.frontend.checks import Violations, check_vocabulary
from scheduler_svc.frontend.errors import DOMAIN, MAX_TEXT, ServiceError

FIELD: Final = "resume_token_ids"


@dataclass(frozen=True)
class Resumed:
    """What the client has of one index. `reason` where these ids end the stream; a stop string shows in text only."""

    field: str  # of the ids, in the request
    token_ids: list[int]
    reason: FinishReason | None = None
    stop_token_id: int = -1


def asks(request: pb.GenerateRequest) -> bool:
    """Whether it depends on what the worker computes with."""
    return bool(request.resume_token_ids or request.resume_fingerprint)


def fingerprint(ready: Ready, adapter_digest: str) -> str:
    """Of all that decides a stream's arithmetic: the worker's, and of its adapter where it has one."""
    if not adapter_digest:
        return ready.fingerprint
    return blake2b(f"{ready.fingerprint}|{adapter_digest}".encode(), digest_size=16).hexdigest()


def check_served(request: pb.GenerateRequest, ready: Ready, adapter_digest: str = "") -> None:
    """Raises ServiceError FAILED_PRECONDITION where other tokens would follow than those that were lost."""
    asked, served = request.resume_fingerprint, fingerprint(ready, adapter_digest)
    if asked and asked != served:
        message = "resume_fingerprint is not that of the model served here: the stream would go on otherwise"
        raise _failed(message, "RESUME_FINGERPRINT", requested=asked[:MAX_TEXT], served=served)
    if _brings_ids(request) and not (ready.exact or request.allow_inexact_resume):
        message = (
            f"{ready.backend} {ready.dtype} is not exact here: a resumed stream may differ from the one that broke"
        )
        detail = f"{message}; allow_inexact_resume takes it as it comes"
        raise _failed(detail, "RESUME_INEXACT", requested=asked[:MAX_TEXT], served=served)


def _brings_ids(request: pb.GenerateRequest) -> bool:
    return any(state.token_ids for state in request.resume_token_ids)


def _failed(message: str, reason: str, **metadata: str) -> ServiceError:
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, message, info)


def read_states(
    request: pb.GenerateRequest, sampling_field: str, vocab_size: int, violations: Violations
) -> dict[int, Resumed]:
    """By index, those with ids. What the length and the ends of a stream say about them is for `with_ends`."""
    params = request.sampling
    n = params.n if params.HasField("n") else 1
    if len(request.resume_token_ids) > n:
        violations.add(FIELD, f"has {len(request.resume_token_ids)} entries; n is {n}")
        return {}
    if _brings_ids(request):
        if not params.HasField("seed"):
            violations.add(f"{sampling_field}.seed", "is not set; a stream goes on under the seed that it began with")
        if not request.resume_fingerprint:
            violations.add(
                "resume_fingerprint", "is not set; a stream goes on under the fingerprint that it began with"
            )
    states: dict[int, Resumed] = {}
    places: dict[int, int] = {}
    for place, state in enumerate(request.resume_token_ids):
        field = f"{FIELD}[{place}]"
        if state.index >= n:
            violations.add(f"{field}.index", f"is {state.index}; n is {n}, and indices count from 0")
        elif state.index in places:
            violations.add(f"{field}.index", f"is {state.index}, as in {FIELD}[{places[state.index]}]")
        places.setdefault(state.index, place)
        ids = list(state.token_ids)
        check_vocabulary(f"{field}.token_ids", ids, vocab_size, violations)
        if ids:
            states[state.index] = Resumed(f"{field}.token_ids", ids)
    return states


def with_ends(states: Mapping[int, Resumed], sampling: Sampling, violations: Violations) -> dict[int, Resumed]:
    """The same, and how those of them ended that have: a stream has no ids behind an end token or its max_tokens."""
    ends = {*sampling.eos_token_ids, *sampling.stop_token_ids}
    found: dict[int, Resumed] = {}
    for index, state in states.items():
        ids, field = state.token_ids, state.field
        if len(ids) > sampling.max_tokens:
            violations.add(
                field, f"has {len(ids)} ids; max_tokens and the context leave room for {sampling.max_tokens}"
            )
        end = next((i for i, token_id in enumerate(ids) if token_id in ends), len(ids))
        if end + 1 < len(ids):
            violations.add(f"{field}[{end + 1}]", f"comes behind {ids[end]}, a token that ends the stream")
        if end < len(ids):
            found[index] = Resumed(field, ids, FinishReason.STOP, ids[end])
        elif len(ids) == sampling.max_tokens:
            found[index] = Resumed(field, ids, FinishReason.LENGTH)
        else:
            found[index] = state
    return found
