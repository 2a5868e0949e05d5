"""One stream over several calls: what it was told and has brought, and how to ask for the rest. Both clients use it.

No I/O. A client reads a call, gives what it hears to `told` and `take`, and where the call fails asks `again` how long
to wait; `request` is then the one to make.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pagewire.v1.inference_pb2 import GenerateDelta, GenerateRequest, GenerateResponse

from client import api
from client.errors import AlreadyExistsError, ServiceError
from client.retry import Attempts

STALE_TIMEOUT = 5.0  # seconds for the cancellation of a broken stream that its service takes for whole


@dataclass
class _Index:
    """What one of the `n` streams has brought."""

    token_ids: list[int] = field(default_factory=list)
    scored: int = 0  # prompt tokens whose logprobs were handed out
    scored_now: int = 0  # … or came again in this call
    finished: bool = False


class Continuation:
    """`attempts` says whether the stream is resumed at all; if it is not, nothing is kept of it."""

    def __init__(self, request: GenerateRequest, attempts: Attempts) -> None:
        self.request, self.attempts = request, attempts
        self._resumes = attempts.resume is not None
        self.resumes = 0  # how often it has been asked to go on behind what it brought
        self._brought = False
        self._metadata: dict[str, str] = {}  # of the first call that came so far
        self._places: set[int] = set()  # that have taken this request under its id
        self._indices: dict[int, _Index] = {}
        self._n = request.sampling.n if request.sampling.HasField("n") else 1

    def told(self, metadata: dict[str, str]) -> dict[str, str]:
        """Takes a call's initial metadata; returns the first that the stream had: id and seed stay what they are."""
        if not metadata:
            return metadata
        self._places.add(self.attempts.place)
        if not self._metadata:
            self._metadata = metadata
            api.told(self.request, metadata)
            if self._resumes:
                self.request.resume_fingerprint = metadata.get("fingerprint", "")
        return self._metadata

    def take(self, response: GenerateResponse) -> api.Chunk | None:
        """What of it is new; None where nothing is."""
        self._brought = True
        if not self._resumes:
            return api.chunk(response)
        self.attempts.progressed()
        chunk = api.chunk(response)
        index = self._indices.setdefault(chunk.index, _Index())
        if index.finished:
            return None  # it had ended before the stream broke, and was only told so again
        if not isinstance(chunk, GenerateDelta):
            index.finished = True
            return chunk
        self._score(chunk, index)
        index.token_ids += chunk.token_ids
        return chunk if chunk.token_ids or chunk.text or chunk.prompt_logprobs else None

    def _score(self, delta: GenerateDelta, index: _Index) -> None:
        """Prompt logprobs begin anew for an index that had no token yet: leaves those that are new."""
        again = max(0, index.scored - index.scored_now)
        index.scored_now += len(delta.prompt_logprobs)
        index.scored = max(index.scored, index.scored_now)
        del delta.prompt_logprobs[:again]

    @property
    def complete(self) -> bool:
        """Every index has ended: what breaks now has nothing left to bring."""
        return self._resumes and sum(index.finished for index in self._indices.values()) == self._n

    def again(self, error: ServiceError) -> float:
        """Seconds until the next call. Raises `error` where it is the last word."""
        is_strangers = (
            isinstance(error, AlreadyExistsError) and not self._metadata
        )  # an id that we chose, and that runs
        if is_strangers or (self._brought and not self._resumes):
            raise error
        pause = self.attempts.again(error)
        if resume := self.attempts.resume:
            self.request.allow_inexact_resume = resume.allow_inexact
            del self.request.resume_token_ids[:]
            for number, index in sorted(self._indices.items()):
                index.scored_now = 0
                if index.token_ids:
                    self.request.resume_token_ids.add(index=number, token_ids=index.token_ids)
            self.resumes += bool(self.request.resume_token_ids)
        return pause

    def runs_at(self, place: int, error: ServiceError) -> str:
        """The id under which the broken stream still runs where `error` came from; "" if it is not known to."""
        return self.request.request_id if isinstance(error, AlreadyExistsError) and place in self._places else ""
