"""What scheduler and workers say to each other, and nothing else: pure messages, no I/O.

Every message is a msgspec array: fields are only ever appended, with defaults, so that a newer peer can read an older
one.
Indices follow `docs/life_of_a_request.md`: slot 0 and block 0 are null, positions count from 0, `−1` means "not set".
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec

PROTOCOL = 5  # raised when a peer of the previous version could misread a message


class Wire(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """A message or a part of one. Append fields only, with defaults."""


class Epoch(NamedTuple):
    """The life of one worker group (R5). A larger counter replaces a smaller one; a new boot id is a new scheduler."""

    boot: int
    counter: int


# ---------------------------------------------------------------- what a request asks for


class Sampling(Wire, frozen=True):
    """Everything that shapes a stream's tokens, resolved: no field is left to a default of the reader.

    Applied in the order of the fields from `bad_words` to `top_p`; logprobs are of the raw distribution.
    """

    max_tokens: (
        int  # output tokens at most, counted from the prompt's end (a resumed prefix counts); 0: none is sampled
    )
    seed: int = 0  # unsigned 64 bits: the Philox key; the frontend always sets one
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0  # no end token before this many output tokens
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0  # 0 is greedy
    min_p: float = 0.0
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()  # the caller's
    eos_token_ids: tuple[int, ...] = ()  # the model's; empty where ignore_eos was asked
    logprobs: int = -1  # how many alternatives beside the sampled token; −1 is no logprobs at all
    prompt_logprobs: int = -1
    prompt_logprobs_from: int = 1  # the first prompt position that is scored: what is before may be cached


class TokenLogprobs(Wire, frozen=True):
    """A token's log probability under the raw distribution, its rank (1 is the likeliest), and the likeliest others."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


# ---------------------------------------------------------------- scheduler → worker


class Setup(Wire, frozen=True):
    """Begins an epoch. The same Setup under a new epoch resets KV and slots and keeps the weights."""

    epoch: Epoch
    model: str  # path as the worker sees it
    revision: str = ""  # of the model; every backend refuses one until there are revisions
    dtype: str = "auto"  # auto | float32 | bfloat16
    quantization: str = ""
    kv_dtype: str = "auto"
    block_size: int = 32  # tokens
    max_slots: int = 0  # slots 1..max_slots, null slot aside
    max_model_len: int = 0  # 0: the model's own
    max_step_tokens: int = 0  # positions of one step at most; no backend sizes anything by it yet
    kv_bytes: int = 0  # memory for KV pages; 0: the worker chooses
    speculation: str = ""  # who proposes drafts: ngram | suffix | draft | eagle3; empty: nobody
    tp_rank: int = 0
    tp_size: int = 1
    tp_address: str = ""
    kv_host_bytes: int = 0  # memory of the host for a second tier of KV; 0: none
    threads: int = 0  # 0: the worker chooses
    sharing: int = 1  # workers on this host: what each chooses by itself (threads, memory) leaves as much to the others
    batch_invariant: bool = False  # a worker that is not exact is refused
    activations: str = "auto"  # what quantized weights are multiplied by; auto: what the checkpoint says
    num_drafts: int = 0  # of a row at most, so that shapes can be warmed; 0 without speculation
    draft_model: str = ""  # path of what `speculation` draft or eagle3 proposes with
    max_adapters: int = 0  # loaded at once; 0: none can be
    max_adapter_rank: int = 0


class Admit(Wire, frozen=True):
    """All that a worker needs to hold a sequence: nothing in a worker exists that an Admit cannot rebuild."""

    slot: int
    token_ids: list[int]  # prompt, then what was already generated
    prompt_len: int
    block_ids: list[list[int]]  # per KV group, in position order
    sampling: Sampling
    adapter: str = ""
    domain: bytes = b""  # opaque digest of tenant and salt: who may meet in a cache that a worker keeps by itself
    pooling: str = ""  # last | mean | cls: the row in which the prompt ends brings `pooled` and samples nothing


class Row(Wire, frozen=True):
    """One sequence's share of a step: compute `num_tokens` positions from `start`, then sample if asked.

    `start` ≥ 0 only for tokens that the scheduler knows; −1 goes on at the slot's own length (R1). `num_tokens` and
    `num_drafts` are maxima.
    """

    slot: int
    start: int
    num_tokens: int
    num_drafts: int = 0
    new_block_ids: list[list[int]] = []  # per KV group, appended to the slot's table before the forward pass
    sample: bool = False
    masked: bool = False
    append_token_ids: list[int] = []  # forced by a grammar: known tokens added before the forward pass


class Direction(IntEnum):
    """Of a copy between a block of the device and one of the host."""

    TO_HOST = 0
    TO_DEVICE = 1


Copy = tuple[Direction, int, int]  # direction, block, host block


class StepPlan(Wire, frozen=True):
    """One forward pass. Applied in the order of the fields: release, admit, copies, rows.

    A copy is done before anything of the step is written, and behind the copies before it. Its block may be one that
    the step's own rows are given: what was there goes to the host first, or what they read comes from there.
    """

    epoch: Epoch
    step: int  # 1, 2, 3 … without a gap within an epoch
    release: list[int]
    admit: list[Admit]
    copies: list[Copy]
    rows: list[Row]
    num_propose: int = 0


class Mask(Wire, frozen=True):
    """Allowed tokens of a plan's masked rows (R3): `bitmask` holds ceil(vocab/32) little-endian words a row."""

    epoch: Epoch
    step: int
    rows: list[int]
    bitmask: bytes


class LoadAdapter(Wire, frozen=True):
    """Between two steps: rows of `step` + 1 on may name it. Answered by AdapterReady."""

    epoch: Epoch
    step: int
    adapter: str
    digest: str
    path: str


class UnloadAdapter(Wire, frozen=True):
    """No row of a later step names it, and none in flight does (R4)."""

    epoch: Epoch
    step: int
    adapter: str


class Shutdown(Wire, frozen=True):
    reason: str


ToWorker = Setup | StepPlan | Mask | LoadAdapter | UnloadAdapter | Shutdown

# ---------------------------------------------------------------- worker → scheduler


class Hello(Wire, frozen=True):
    rank: int
    version: str
    protocol: int
    features: tuple[str, ...] = ()
    device: str = ""
    pid: int = 0


class Ready(Wire, frozen=True):
    """The epoch can take plans: weights are loaded, shapes are warm."""

    epoch: Epoch
    rank: int
    num_blocks: int  # null block included: ids 1..num_blocks−1 are usable
    num_host_blocks: int = 0  # of the second tier: ids 0..num_host_blocks−1
    groups: int = 1  # KV groups
    align: int = 1  # chunk starts and cache hits fall on multiples of this many tokens, or results may differ in bits
    exact: bool = False  # R2: the same bits whatever the batch, the chunking, the cache
    graph_shapes: tuple[int, ...] = ()  # tokens of the steps captured as graphs; the scheduler plans without them yet
    device: str = ""
    dtype: str = ""
    backend: str = ""
    max_model_len: int = 0
    vocab_size: int = 0
    fingerprint: str = ""  # digest of all that decides the arithmetic: a stream may be resumed only under the same one
    quantization: str = ""  # of the weights as they are multiplied; empty: they are in `dtype`
    kv_dtype: str = ""
    step_seconds: tuple[tuple[int, float], ...] = ()  # measured at warm-up: positions of a decode step, its seconds
    hidden_size: int = 0  # floats of `pooled`; 0: it makes none
    propose_seconds: tuple[tuple[int, float], ...] = ()  # slots that propose, seconds of one more draft of each


class AdapterReady(Wire, frozen=True):
    """`trouble`: why it could not be loaded, in one line naming file, tensor or field; the epoch goes on without it."""

    epoch: Epoch
    adapter: str
    trouble: str = ""


class RowResult(Wire, frozen=True):
    """`start` is the slot's known length before it appended `token_ids` (accepted drafts and the bonus token)."""

    slot: int
    start: int
    token_ids: list[int]  # empty in the middle of a prompt
    logprobs: list[TokenLogprobs] = []  # one for each of token_ids, where asked
    num_drafted: int = 0
    prompt_logprobs: list[TokenLogprobs] = []  # of the prompt tokens at row.start+1 …, where asked
    pooled: bytes = b""  # little-endian float32 [hidden_size], not normalized, where the Admit asked for it


class Timings(Wire, frozen=True):
    """Seconds on the worker's clock. Sent with every result; the scheduler does not look at them yet."""

    forward: float = 0.0
    sample: float = 0.0
    idle: float = 0.0  # between the previous result and this plan's arrival


class StepResult(Wire, frozen=True):
    epoch: Epoch
    step: int
    rows: list[RowResult]
    copied: list[int] = []  # the host block of each of the plan's copies: they have been done
    timings: Timings = Timings()


class Phase(IntEnum):
    """LOADING and COMPILING put the load deadline in place of the step deadline, until a result or RUNNING."""

    LOADING = 1
    COMPILING = 2  # within a step; nothing compiles there yet
    RUNNING = 3  # a step goes on after COMPILING; not sent yet


class Status(Wire, frozen=True):
    """How far the main thread is, said by itself between two pieces of work: the load deadline begins anew.

    So none comes from the middle of a piece, nor from a main thread that hangs.
    """

    epoch: Epoch
    phase: Phase
    step: int = 0
    rank: int = 0
    progress: float = 0.0  # of the phase, 0..1
    detail: str = ""


class Fault(Wire, frozen=True):
    """The worker cannot go on with this epoch. `fatal`: nor with another (a model that cannot be read, say)."""

    epoch: Epoch
    step: int
    reason: str
    fatal: bool = False


FromWorker = Hello | Ready | AdapterReady | StepResult | Status | Fault
