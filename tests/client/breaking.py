"""A server whose streams break, and go on as the service's do: the prompt's words are its tokens, a message each."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from pagewire.v1 import inference_pb2 as pb

from tests.client.scripted import PATIENCE, Context, ScriptedServer


class BreakingServer(ScriptedServer):
    """`ends` says how each call breaks, in turn: (messages that it brings, status, reason); `WAIT` goes on when
    it is let. Those behind them do not break.

    An id stays taken behind a break as long as `deaf`, unless CancelGeneration frees it.
    """

    def __init__(self, fingerprint: str = "f00d") -> None:
        super().__init__()
        self.fingerprint = fingerprint
        self.ends: list[tuple[int, str, str]] = []
        self.deaf = False
        self.running: set[str] = set()
        self.cancels: list[str] = []
        self.go = threading.Event()  # what waits for `WAIT`

    def Generate(self, request: pb.GenerateRequest, context: Context) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        words, end = self._words(request), self.ends.pop(0) if self.ends else None
        for word in words:
            self._id(word)
        if request.resume_fingerprint not in ("", self.fingerprint):
            _abort(context, "FAILED_PRECONDITION", "RESUME_FINGERPRINT")
        request_id = request.request_id or "made"
        if request_id in self.running:
            _abort(context, "ALREADY_EXISTS", "REQUEST_ID_IN_USE")
        seed = str(request.sampling.seed if request.sampling.HasField("seed") else 77)
        metadata = (("request-id", request_id), ("seed", seed), ("fingerprint", self.fingerprint))
        context.send_initial_metadata(metadata)
        if self.deaf:
            self.running.add(request_id)
        responses = self._responses(request, words)
        if end:
            yield from itertools.islice(responses, end[0])
            if end[1] != "WAIT":
                _abort(context, *end[1:])
            assert self.go.wait(PATIENCE), "nobody let it go on"
        yield from responses
        self.running.discard(request_id)

    def _responses(self, request: pb.GenerateRequest, words: list[str]) -> Iterator[pb.GenerateResponse]:
        """Of `n` streams, each of which ends a word before the one before it."""
        n = request.sampling.n if request.sampling.HasField("n") else 1
        had = {state.index: len(state.token_ids) for state in request.resume_token_ids}
        if request.sampling.HasField("prompt_logprobs"):
            for index, word in itertools.product([i for i in range(n) if not had.get(i)], words[1:]):
                scores = [pb.TokenLogprob(token_id=self._id(word))]
                yield pb.GenerateResponse(delta=pb.GenerateDelta(index=index, prompt_logprobs=scores))
        for place, index in itertools.product(range(len(words)), range(n)):
            last = len(words) - 1 - index
            if had.get(index, 0) <= place <= last:
                delta = pb.GenerateDelta(index=index, text=f"{words[place]} ", token_ids=[self._id(words[place])])
                yield pb.GenerateResponse(delta=delta)
            if place == last:
                yield pb.GenerateResponse(finished=pb.GenerateFinished(index=index))

    def CancelGeneration(self, request: pb.CancelGenerationRequest, context: Context) -> pb.CancelGenerationResponse:
        self.cancels.append(request.request_id)
        if request.request_id not in self.running:
            context.abort(grpc.StatusCode.NOT_FOUND, "not running")
        self.running.discard(request.request_id)
        return pb.CancelGenerationResponse()


def _abort(context: Context, code: str, reason: str) -> None:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason)] if reason else []
    status = status_pb2.Status(code=grpc.StatusCode[code].value[0], message="broken")
    for detail in details:
        status.details.add().Pack(detail)
    context.abort_with_status(rpc_status.to_status(status))
