"""The ZeroMQ sockets: strangers and a lying worker at the scheduler, a lying scheduler at a worker."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence

import msgspec
import zmq

from protos.codec import DecodeError, decode_to_engine, encode
from protos.engine_wire import (
    Abort,
    Ask,
    FinishReason,
    FrontendBeat,
    FrontendHello,
    FrontendLost,
    Observed,
    Question,
    Shed,
    Submit,
    ToEngine,
    WatchKv,
)
from protos.wire import (
    PROTOCOL,
    Admit,
    Epoch,
    Fault,
    FromWorker,
    Hello,
    LoadAdapter,
    Mask,
    Phase,
    Ready,
    Row,
    RowResult,
    Sampling,
    Setup,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
    TokenLogprobs,
)
from scheduler_svc.metrics import Observer
from tests.fuzz.messages import mutate
from tests.worker.scheduler_end import SchedulerEnd, setup

_NUMBERS = (-(1 << 63), -(1 << 31), -2, -1, 0, 1, 2, 3, 5, 31, 32, 33, 64, 300, 1 << 20, (1 << 31) - 1, 1 << 40)
_FLOATS = (0.0, 1.0, -1.0, 1e30, -1e30, 1e-30, 0.5)

HEARD: Sequence[FromWorker] = (
    Hello(0, "1", PROTOCOL, ("a",), "cpu", 7),
    Ready(Epoch(1, 1), 0, 100, max_model_len=64, vocab_size=500),
    StepResult(Epoch(1, 1), 1, [RowResult(1, 5, [300], [TokenLogprobs(300, -1.0, 1, (1,), (-1.0,))])]),
    Status(Epoch(1, 1), Phase.LOADING, progress=0.5, detail="x"),
    Fault(Epoch(1, 1), 1, "because"),
)


# Its poison is a token that ends a worker on purpose; this one is none of those above.
FAKE = setup(model="fake:poison=-3")


_OBSERVER = Observer()
_OBSERVER.first_token(0.1)
_OBSERVER.call_ended("/pagewire.v1.InferenceService/Generate", "OK")
SAID: Sequence[ToEngine] = (
    FrontendHello("stranger"),
    FrontendBeat("stranger"),
    FrontendLost("stranger"),
    Submit("r", [300, 301], 2, Sampling(max_tokens=3, seed=1), frontend="stranger"),
    Shed("stranger", "t", 3),
    Abort("r", FinishReason.STOP, 0, "stranger"),
    Ask(1, Question.STATS, frontend="stranger"),
    WatchKv(1, "stranger"),
    Observed("stranger", _OBSERVER.snapshot(1)),
)


def lies(rng: random.Random, count: int, truth: Sequence[FromWorker | ToEngine] = HEARD) -> list[bytes]:
    """For the scheduler, from somebody who is no worker of it, or no frontend."""
    made: list[bytes] = []
    while len(made) < count:
        lie = mutate(encode(rng.choice(truth)), rng)
        if not _drains(lie):
            made.append(lie)
    return made


def _drains(frame: bytes) -> bool:
    """A frontend may ask for it, and it would be done."""
    try:
        match decode_to_engine(frame):
            case Ask(question=Question.DRAIN):
                return True
    except DecodeError:
        pass
    return False


def whisper(endpoint: str, frames: Sequence[bytes], rng: random.Random) -> None:
    """Says them to a ROUTER, over several connections, one frame or several at a time."""
    context = zmq.Context()
    try:
        rest = list(frames)
        while rest:
            with context.socket(zmq.DEALER) as dealer:
                dealer.setsockopt(zmq.LINGER, 2000)
                dealer.connect(endpoint)
                for _ in range(200):
                    if not rest:
                        break
                    together = [rest.pop() for _ in range(min(len(rest), rng.choice((1, 1, 2, 5))))]
                    dealer.send_multipart(together)
    finally:
        context.term()


class PlanLiar:
    """A scheduler that begins each epoch as it should, and then plans what cannot be followed."""

    def __init__(self, end: SchedulerEnd, process: subprocess.Popen[str], first: Setup, seed: int) -> None:
        self.end, self.process, self.rng = end, process, random.Random(seed)
        self._setup = first
        self._counter = first.epoch.counter
        self.faults = self.results = 0

    def round(self) -> None:
        """One epoch: a few plans, the last of them wrong. The worker answers, or says why it cannot."""
        self._counter += 1
        begin = msgspec.structs.replace(self._setup, epoch=Epoch(self._setup.epoch.boot, self._counter))
        self.end.until_ready(begin)
        good = self._good(begin.epoch)
        if self.rng.random() < 0.5:
            frame = mutate(encode(self.rng.choice(good)), self.rng)
        else:
            frame = encode(self._bent(self.rng.choice(good)))
        sound = [encode(plan) for plan in good[: self.rng.randrange(3)]]
        self.end.router.send_multipart((self.end.peer, *sound, frame))
        adapter = LoadAdapter(begin.epoch, 99, "a", "", "")
        self.end.send(Mask(begin.epoch, 1, [], b""), adapter, StepPlan(begin.epoch, 99, [], [], [], []))  # faults
        while True:
            heard = self.end.receive_any()
            if isinstance(heard, StepResult):
                self.results += 1
            elif isinstance(heard, Fault):
                self.faults += 1
                return
            elif isinstance(heard, Hello | Ready):
                raise AssertionError(f"the worker began anew: {heard}, exit code {self.process.poll()}")

    def _good(self, epoch: Epoch) -> list[StepPlan]:
        rng, blocks = self.rng, [[1, 2, 3]]
        sampling = Sampling(max_tokens=20, seed=rng.getrandbits(64), temperature=rng.choice((0.0, 0.8)), logprobs=1)
        prompt = [rng.randrange(1, 90) for _ in range(5)]
        return [
            StepPlan(epoch, 1, [], [Admit(1, prompt, 5, blocks, sampling)], [], [Row(1, 0, 5, sample=True)]),
            StepPlan(epoch, 2, [], [], [], [Row(1, -1, 1, sample=True)]),
            StepPlan(epoch, 3, [1], [Admit(2, prompt, 5, [[4, 5]], sampling)], [], [Row(2, 0, 4)]),
        ]

    def _bent(self, plan: StepPlan) -> StepPlan:
        """With one value, somewhere, that is of the right type and wrong."""
        rng = self.rng
        replace = msgspec.structs.replace
        match rng.randrange(4):
            case 0:
                return replace(plan, **{rng.choice(("release",)): [self._number()]})
            case 1 if plan.admit:
                return replace(plan, admit=[self._bent_admit(plan.admit[0])])
            case 2:
                return replace(plan, copies=[(self._number(), self._number(), self._number())])
        row = plan.rows[0]
        name = rng.choice(("slot", "start", "num_tokens", "num_drafts", "new_block_ids", "append_token_ids"))
        lists = {"new_block_ids": [[self._number()]], "append_token_ids": [self._number()]}
        return replace(plan, rows=[replace(row, **{name: lists.get(name, self._number())})])

    def _bent_admit(self, admit: Admit) -> Admit:
        rng, replace = self.rng, msgspec.structs.replace
        match rng.randrange(4):
            case 0:
                return replace(admit, slot=self._number())
            case 1:
                return replace(admit, prompt_len=self._number())
            case 2:
                return replace(admit, token_ids=[self._number() for _ in range(rng.randrange(8))])
        whole = ("top_k", "min_tokens", "logprobs", "prompt_logprobs", "seed", "max_tokens")
        real = ("temperature", "min_p", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        fields: dict[str, object] = {
            rng.choice(whole): self._number(),
            rng.choice(real): rng.choice(_FLOATS),
            "logit_bias": ((self._number(), rng.choice(_FLOATS)),) if rng.random() < 0.3 else (),
            "bad_words": ((self._number(),), ()) if rng.random() < 0.3 else (),
            "stop_token_ids": (self._number(),),
        }
        return replace(admit, sampling=replace(admit.sampling, **fields))

    def _number(self) -> int:
        return self.rng.choice(_NUMBERS)


def end_of(end: SchedulerEnd, process: subprocess.Popen[str]) -> int:
    """Whether it still listens: Shutdown ends it, with this code."""
    end.send(Shutdown("enough"))
    return process.wait(30)
