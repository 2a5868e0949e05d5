"""What frontends and the engine say to each other: pure messages by the rules of `protos.wire`."""

from __future__ import annotations

from enum import IntEnum

from protos.wire import Ready, Sampling, TokenLogprobs, Wire


class FinishReason(IntEnum):
    """Why a stream ended; all but the first two end the call with an error status."""

    STOP = 1  # an end token, a stop id or a stop string; or all was computed where nothing is sampled
    LENGTH = 2
    ABORTED = 3
    DEADLINE = 4
    REJECTED = 5  # the queue is full, see `retry_after`
    DRAINING = 6
    ERROR = 7  # the request itself kills workers (R5)
    INVALID = 8  # cannot be served under these limits, see `detail`
    DUPLICATE = 9  # its request id is running already
    QUOTA = 10  # of its tenant is used up, see `retry_after`
    NOT_FOUND = 11  # it names an adapter that is not loaded, see `detail`
    GRAMMAR = 12  # its grammar is no grammar, or too much to follow, see `detail`


class FrontendHello(Wire, frozen=True):
    frontend: str


class FrontendLost(Wire, frozen=True):
    """Ends all requests of a frontend. Said for it: by whoever notices. One in the engine's process cannot be lost."""

    frontend: str


class FrontendBeat(Wire, frozen=True):
    """Each second, from the event loop of a frontend in a process of its own: it does not hang."""

    frontend: str


class Grammar(Wire, frozen=True):
    """What the output has to be. `kind`: json_schema | regex | ebnf | choice (a JSON list) | json | structural_tag."""

    kind: str
    text: str = ""


class Submit(Wire, frozen=True):
    """One sequence. `n` > 1 arrives as n Submits with one request_id and indices 0..n−1."""

    request_id: str
    token_ids: list[int]  # prompt, then what a resumed stream already had
    prompt_len: int
    sampling: Sampling
    index: int = 0
    num_siblings: int = 1  # the `n` of its request
    priority: int = 0  # smaller goes first
    tenant: str = ""
    deadline: float = 0.0  # on the clock that Tick brings; 0 is none
    cache_salt: str = ""
    adapter: str = ""
    frontend: str = ""
    skip_cache: bool = False  # reads nothing from the prefix cache (prompt logprobs imply it)
    grammar: Grammar | None = None
    pooling: str = ""  # last | mean | cls: ends with `pooled` in place of tokens
    request_tokens: int = 0  # of all sequences of its request; 0: each has as many as this one
    adapter_digest: str = ""  # of the adapter that is meant: blocks are shared by it, not by the name


class Abort(Wire, frozen=True):
    """Ends all indices of a request, or one. `reason` STOP is the frontend's stop string."""

    request_id: str
    reason: FinishReason = FinishReason.ABORTED
    index: int = -1  # −1: all
    frontend: str = ""  # only if it is the request of this one; empty: whosever it is


class TokenDelta(Wire, frozen=True):
    """What one sequence gained in one step; with `finish_reason` it is the sequence's last."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int = -1  # the id that ended it: the last of token_ids
    prompt_logprobs: list[TokenLogprobs] = []
    cached_tokens: int = 0  # prompt tokens read from the prefix cache at the first admission
    retry_after: float = 0.0  # seconds, with REJECTED and QUOTA
    detail: str = ""
    num_drafted: int = 0
    num_accepted: int = 0
    tenant: str = ""  # of a request that was refused
    queued: float = 0.0  # seconds from its Submit to its first admission, by the Ticks
    shed_for: float = 0.0  # seconds, with REJECTED: no fewer sequences of this tenant, of no better priority, will do
    pooled: bytes = b""  # little-endian float32, not normalized


class Shed(Wire, frozen=True):
    """Sequences that a frontend refused by itself, see `TokenDelta.shed_for`: they count as if they had come here."""

    frontend: str
    tenant: str
    sequences: int


class Outputs(Wire, frozen=True):
    """One message per step and frontend."""

    items: list[TokenDelta]
    frontend: str = ""


class WatchKv(Wire, frozen=True):
    """A frontend wants to know which blocks are published: all there are now for `watcher`, a number of its own, and
    from then on every change. 0: it does not want to know any more.
    """

    watcher: int
    frontend: str = ""


class KvBlock(Wire, frozen=True):
    """A published block. Its digest covers its tokens and all before them: equal digests are equal prefixes."""

    digest: bytes
    parent: bytes  # the digest of the block before it; the root's for a first one
    root: bytes  # of tenant, salt and adapter: whose prefix it is, without saying it
    token_ids: bytes  # unsigned numbers of 32 bits, in this host's order


class KvEvents(Wire, frozen=True):
    """What changed among the published blocks, in this order: a block was published, or a digest is there no more."""

    number: int  # of the last change, over the service's life
    changes: list[KvBlock | bytes]
    reset: bool = False  # forget all that was there before
    watcher: int = 0  # for it alone, all that is there; 0: for all who have had that
    frontend: str = ""


class Question(IntEnum):
    STATS = 1
    FLUSH_CACHE = 2
    DRAIN = 3  # answered when the last accepted sequence has ended
    CANCEL = 4
    LOAD_ADAPTER = 5  # answered when every worker group has it, or one could not load it
    UNLOAD_ADAPTER = 6  # answered when nobody uses it any more
    LIST_ADAPTERS = 7


class Adapter(Wire, frozen=True):
    name: str
    path: str = ""
    digest: str = ""  # of its files
    rank: int = 0
    users: int = 0  # sequences that name it


class Ask(Wire, frozen=True):
    """A question of a frontend; `token` comes back in the Answer."""

    token: int
    question: Question
    request_id: str = ""  # with CANCEL
    frontend: str = ""
    tenant: str | None = None  # with CANCEL: of this tenant's requests alone; None: of anybody's
    adapter: Adapter | None = None  # with LOAD_ADAPTER and UNLOAD_ADAPTER


class Histogram(Wire, frozen=True):
    """How many values fell into each range: counts[i] up to bounds[i], the last of counts above all bounds."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    total: float = 0.0  # sum of the values


class TenantFigures(Wire, frozen=True):
    """Sequences and tokens of one tenant since the start, or of several (see engine/measures.py)."""

    name: str
    running: int = 0
    waiting: int = 0
    requests: int = 0  # let into the queue
    refused: int = 0
    prompt_tokens: int = 0  # of those that ran
    output_tokens: int = 0


class EngineStats(Wire, frozen=True):
    """Counts at one moment. num_blocks (null block aside) = free + cached + owned + fenced."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    owned_blocks: int = 0
    fenced_blocks: int = 0
    num_slots: int = 0
    free_slots: int = 0
    steps: int = 0
    preemptions: int = 0
    recoveries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    rejected: int = 0
    draining: bool = False
    queue_wait: Histogram = Histogram()  # seconds from a Submit to its first admission
    step_seconds: Histogram = Histogram()  # as the worker measured
    step_rows: Histogram = Histogram()  # of a plan, and the positions that it computes at most
    step_tokens: Histogram = Histogram()
    refused: tuple[tuple[FinishReason, int], ...] = ()  # sequences that never ran
    tenants: list[TenantFigures] = []
    host_cached_tokens: int = 0  # of cached_tokens: what came from the second tier
    num_host_blocks: int = 0
    cached_host_blocks: int = 0
    copied_to_host: int = 0  # blocks, since the start
    copied_to_device: int = 0
    draft_rows: int = 0  # rows of steps that verified drafts, since the start
    draft_tokens: int = 0
    accepted_at: tuple[int, ...] = ()  # drafts that were right, by their place in the row


class WorkerStatus(Wire, frozen=True):
    """One worker process as the loop sees it. `state`: starting, loading, serving or lost."""

    state: str
    pid: int = 0
    device: str = ""
    detail: str = ""
    progress: float = 0.0


class WorkerFigures(Wire, frozen=True):
    """What changes all the time of a worker, and is no news: beside WorkerStatus, so that nobody is woken for it."""

    state_seconds: float = 0.0  # in its present state
    steps: int = 0  # answered by this worker's place in the service, whoever held it
    busy_seconds: float = 0.0  # that those took
    in_flight: int = 0
    losses: int = 0


class Loss(Wire, frozen=True):
    """A worker that died, or was given up."""

    ago: float  # seconds
    pid: int
    reason: str


class FrontendStats(Wire, frozen=True):
    """What frontends saw of their clients since they began. Those of several add up (scheduler_svc/metrics.py)."""

    first_token: Histogram = Histogram()  # seconds from a call's begin
    between_tokens: Histogram = Histogram()
    whole: Histogram = Histogram()  # seconds of a stream, and its three parts
    queue: Histogram = Histogram()
    prefill: Histogram = Histogram()
    decode: Histogram = Histogram()
    prompt_tokens: Histogram = Histogram()  # of a stream
    output_tokens: Histogram = Histogram()
    finished: tuple[tuple[str, int], ...] = ()  # streams: stop, length, abort, error
    calls: tuple[tuple[str, int], ...] = ()  # "/service/method CODE"
    open_calls: int = 0


class Observed(Wire, frozen=True):
    """A frontend's whole, which replaces what it said before."""

    frontend: str
    stats: FrontendStats


class ServiceStatus(Wire, frozen=True):
    """Pushed to every frontend when it changes, and part of every Answer."""

    serving: bool
    reason: str  # why not, in one line for a person
    ready: Ready | None  # of the newest epoch, also while its worker is dead
    workers: list[WorkerStatus]
    stats: EngineStats
    failed: bool = False  # the worker said that it can never serve this: the service stops
    figures: list[WorkerFigures] = []  # one for each of workers
    losses: list[Loss] = []  # the newest few, newest first
    frontends: FrontendStats = FrontendStats()  # of all of them, those that have gone included
    adapters: list[Adapter] = []  # that requests may name; `users` only in an Answer
    max_adapters: int = 0


class FrontendStop(Wire, frozen=True):
    """To all frontends that are processes of their own: end, once all requests have, within `grace` seconds. 0: now."""

    grace: float


class Answer(Wire, frozen=True):
    token: int
    status: ServiceStatus
    found: bool = True  # with CANCEL
    freed_blocks: int = 0  # with FLUSH_CACHE
    frontend: str = ""
    trouble: str = ""  # why it was not done, in one line
    adapters: list[Adapter] = []  # with LIST_ADAPTERS


ToEngine = FrontendHello | FrontendLost | FrontendBeat | Submit | Shed | Abort | Ask | WatchKv | Observed
ToFrontend = Outputs | ServiceStatus | FrontendStop | Answer | KvEvents
