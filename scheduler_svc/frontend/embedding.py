"""EmbedRequest → Submits that are pooled, and pooled states → the vectors that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from pagewire.v1 import inference_pb2 as pb

from protos.wire import Sampling
from scheduler_svc.frontend.checks import Violations
from scheduler_svc.frontend.core import Computed, Core
from scheduler_svc.frontend.errors import Violation, no_pooling
from scheduler_svc.frontend.limits import MAX_INPUTS
from scheduler_svc.frontend.validation import Caller, Computing, Prepared, check_computing

_KINDS: Final = {pb.POOLING_LAST: "last", pb.POOLING_MEAN: "mean", pb.POOLING_CLS: "cls"}
_LEAST_NORM: Final = 1e-12  # a vector of zeros stays one


@dataclass(frozen=True)
class VectorForm:
    dimensions: int
    normalize: bool = True

    def vector(self, pooled: bytes) -> list[float]:
        """Cut first, then brought to length 1."""
        values = np.frombuffer(pooled, "<f4")[: self.dimensions].astype(np.float64)
        if self.normalize:
            values /= max(float(np.linalg.norm(values)), _LEAST_NORM)
        whole: list[float] = values.astype(np.float32).tolist()
        return whole


async def hidden_size(core: Core) -> int:
    """Floats of a pooled output, once a worker has been ready. Raises ServiceError FAILED_PRECONDITION where the one
    that serves makes none.
    """
    ready = await core.first_ready()
    if not ready.hidden_size:
        raise no_pooling(f"the {ready.backend} backend makes no embeddings")
    return ready.hidden_size


async def prepare(core: Core, request: pb.EmbedRequest, caller: Caller) -> tuple[Prepared, VectorForm]:
    """Raises ServiceError NOT_FOUND for its adapter, INVALID_ARGUMENT with all violations."""
    digest = await core.adapter_digest(request.adapter)
    most, violations = await hidden_size(core), Violations()
    check_computing(request, caller, violations)
    if not 1 <= (count := len(request.inputs)) <= MAX_INPUTS:
        violations.add("inputs", f"has {count} inputs; must have 1 to {MAX_INPUTS}")
    cut = request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None
    longest = core.max_model_len()
    if cut is not None and not 1 <= cut <= longest:
        violations.add("truncate_prompt_tokens", f"is {cut}; must be in [1, {longest}]")
    dimensions = request.dimensions if request.HasField("dimensions") else most
    if not 1 <= dimensions <= most:
        violations.add("dimensions", f"is {dimensions}; must be in [1, {most}]")
    if request.pooling and request.pooling not in _KINDS:
        violations.add("pooling", f"is {request.pooling}; must be LAST, MEAN or CLS")
    violations.check()
    prompts = [await _prompt(core, i, given, cut, violations) for i, given in enumerate(request.inputs)]
    violations.check()
    pooling = _KINDS[request.pooling] if request.pooling else default_pooling(core)
    computing = [Computing(ids, Sampling(max_tokens=0)) for ids in prompts]
    form = VectorForm(dimensions, request.normalize if request.HasField("normalize") else True)
    return core.preparer.computing(request, computing, caller, digest, pooling), form


async def _prompt(core: Core, i: int, given: pb.EmbedInput, cut: int | None, violations: Violations) -> list[int]:
    if given.HasField("chat") and not given.chat.HasField("add_generation_prompt"):
        given.chat.add_generation_prompt = False
    own = Violations()
    token_ids = await core.preparer.prompt(given, own, spare=0, cut=cut)
    violations += [Violation(f"inputs[{i}].{violation.field}", violation.problem) for violation in own]
    return token_ids


def default_pooling(core: Core) -> str:
    """The model's own. Raises ServiceError FAILED_PRECONDITION where that is not served."""
    card = core.model.card
    if card.pooling.trouble:
        raise no_pooling(f"{card.pooling.trouble}; name a pooling to have the states as they are")
    return card.pooling.kind


def response(prepared: Prepared, form: VectorForm, computed: list[Computed]) -> pb.EmbedResponse:
    return pb.EmbedResponse(
        embeddings=[
            pb.Embedding(values=form.vector(one.pooled), prompt_tokens=submit.prompt_len)
            for one, submit in zip(computed, prepared.submits, strict=True)
        ],
        usage=usage(prepared, computed),
    )


def usage(prepared: Prepared, computed: list[Computed]) -> pb.Usage:
    return pb.Usage(prompt_tokens=prepared.prompt_len, cached_tokens=sum(one.cached_tokens for one in computed))
