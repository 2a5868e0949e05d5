"""ScoreRequest → one Submit a candidate, which all share the prompt's blocks; log probabilities → scores."""

from __future__ import annotations

import math

from pagewire.v1 import inference_pb2 as pb

from protos.wire import Sampling
from scheduler_svc.frontend.checks import Violations, check_vocabulary
from scheduler_svc.frontend.core import Computed, Core
from scheduler_svc.frontend.embedding import usage
from scheduler_svc.frontend.limits import MAX_INPUTS, MAX_SCORED
from scheduler_svc.frontend.validation import Caller, Computing, Prepared, check_computing


async def prepare(core: Core, request: pb.ScoreRequest, caller: Caller) -> Prepared:
    """Raises ServiceError NOT_FOUND for its adapter, INVALID_ARGUMENT with all violations."""
    digest, violations = await core.adapter_digest(request.adapter), Violations()
    check_computing(request, caller, violations)
    if not 1 <= (count := len(request.candidates)) <= MAX_INPUTS:
        violations.add("candidates", f"has {count} candidates; must have 1 to {MAX_INPUTS}")
        violations.check()
    prompt = await core.preparer.prompt(request, violations)
    candidates = [await _candidate(core, i, given, violations) for i, given in enumerate(request.candidates)]
    violations.check()
    room = core.max_model_len() - len(prompt)
    for i, token_ids in enumerate(candidates):
        if len(token_ids) > room:
            violations.add(f"candidates[{i}]", f"has {len(token_ids)} tokens; the prompt leaves room for {room}")
    if (total := sum(map(len, candidates))) > MAX_SCORED:
        violations.add("candidates", f"have {total} tokens together; at most {MAX_SCORED}")
    violations.check()
    # What scores a candidate's first token is the prompt's last position.
    sampling = Sampling(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(prompt))
    computing = [Computing(prompt + token_ids, sampling) for token_ids in candidates]
    return core.preparer.computing(request, computing, caller, digest)


async def _candidate(core: Core, i: int, given: pb.ScoreCandidate, violations: Violations) -> list[int]:
    field, longest = f"candidates[{i}]", core.max_model_len()
    match given.WhichOneof("continuation"):
        case "text":
            return await core.preparer.tokenize(f"{field}.text", given.text, False, longest, violations)
        case "token_ids":
            token_ids = list(given.token_ids.ids)
            if not token_ids:
                violations.add(f"{field}.token_ids.ids", "is empty; a candidate has at least 1 token")
            check_vocabulary(f"{field}.token_ids.ids", token_ids, core.model.card.vocab_size, violations)
            return token_ids
        case _:
            violations.add(field, "is not set; give text or token ids")
            return []


def response(prepared: Prepared, computed: list[Computed]) -> pb.ScoreResponse:
    shared = prepared.submits[0].sampling.prompt_logprobs_from
    total = usage(prepared, computed)
    total.prompt_tokens -= (len(computed) - 1) * shared
    return pb.ScoreResponse(scores=[_score(one) for one in computed], usage=total)


def _score(one: Computed) -> pb.Score:
    logprobs = [entry.logprob for entry in one.prompt_logprobs]
    total = math.fsum(logprobs)
    token_ids = [entry.token_id for entry in one.prompt_logprobs]
    return pb.Score(sum=total, mean=total / len(logprobs), logprobs=logprobs, token_ids=token_ids)
