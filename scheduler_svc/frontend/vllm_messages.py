"""vLLM's Generate messages ↔ ours. Proto zero means "default" there, of `top_p`, `repetition_penalty` and `n`."""

from __future__ import annotations

from typing import Final

from pagewire.v1 import inference_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]

from protos.engine_wire import FinishReason
from protos.wire import TokenLogprobs
from scheduler_svc.frontend.checks import Violations
from scheduler_svc.frontend.errors import Violation
from scheduler_svc.frontend.streams import Ending, Gain

NOT_SERVED: Final = (
    "kv_transfer_params",
    "mm_inputs",
    "extra_mm_inputs",
    "kv_transfer_params_json",
    "data_parallel_rank",
    "media_refs",
)
PREFIX: Final = "sampling_params"


def translate(request: vllm.GenerateRequest) -> tuple[pb.GenerateRequest, list[Violation]]:
    """Our request, and what in theirs cannot be said in ours."""
    violations = Violations()
    given = {descriptor.name for descriptor, _ in request.ListFields()}
    for field in NOT_SERVED:
        if field in given:
            violations.add(field, "is not served; leave it unset")
    translated = pb.GenerateRequest(
        request_id=request.request_id, sampling=_sampling(request.sampling_params, violations)
    )
    if constraint := request.sampling_params.WhichOneof("constraint"):
        _constrain(translated.structured_output, request.sampling_params, constraint)
    match request.WhichOneof("input"):
        case "tokenized":
            translated.token_ids.ids.extend(request.tokenized.input_ids)
            translated.token_ids.SetInParent()
        case "text":
            translated.text = request.text
    return translated, violations


def _constrain(ours: pb.StructuredOutput, theirs: vllm.SamplingParams, constraint: str) -> None:
    """`grammar_from_first_token` is taken at either value: here a grammar always begins with the first one."""
    if constraint == "choice":
        ours.choice.values.extend(theirs.choice.choices)
        ours.choice.SetInParent()
    else:
        setattr(ours, constraint, getattr(theirs, constraint))


def _sampling(theirs: vllm.SamplingParams, violations: Violations) -> pb.SamplingParams:
    """`spaces_between_special_tokens` is taken at either value: it shapes text only, and this service returns ids.
    False could not be refused anyway: proto3 cannot tell it from unset, which means true in vLLM.
    """
    if theirs.HasField("truncate_prompt_tokens"):
        violations.add(f"{PREFIX}.truncate_prompt_tokens", "is not served; leave it unset")
    ours = pb.SamplingParams(
        temperature=theirs.temperature if theirs.HasField("temperature") else 1.0,
        top_k=theirs.top_k,
        top_p=theirs.top_p or 1.0,
        min_p=theirs.min_p,
        repetition_penalty=theirs.repetition_penalty or 1.0,
        presence_penalty=theirs.presence_penalty,
        frequency_penalty=theirs.frequency_penalty,
        stop=theirs.stop,
        stop_token_ids=theirs.stop_token_ids,
        include_stop_str_in_output=theirs.include_stop_str_in_output,
        min_tokens=theirs.min_tokens,
        ignore_eos=theirs.ignore_eos,
        n=theirs.n or 1,
        skip_special_tokens=theirs.skip_special_tokens,
    )
    if theirs.HasField("max_tokens"):
        ours.max_tokens = theirs.max_tokens
    if theirs.HasField("seed"):
        ours.seed = theirs.seed & 0xFFFF_FFFF_FFFF_FFFF  # a negative one is a number like any other
    for field in ("logprobs", "prompt_logprobs"):
        if not theirs.HasField(field):
            continue
        if (count := getattr(theirs, field)) < 0:
            violations.add(f"{PREFIX}.{field}", f"is {count}; must be in [0, 20]")
        else:
            setattr(ours, field, count)
    for token_id, bias in sorted(theirs.logit_bias.items()):
        if token_id < 0:
            violations.add(f"{PREFIX}.logit_bias[{token_id}]", "names a negative token id")
        else:
            ours.logit_bias[token_id] = bias
    return ours


class IndexOutput:
    """One index's chunks, gathered for its GenerateComplete, which repeats everything."""

    def __init__(self, index: int, prompt: list[int]) -> None:
        self.index, self.prompt_tokens, self._first_id = index, len(prompt), prompt[0]
        self.is_complete = False
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._cached = 0

    def gain(self, gain: Gain) -> vllm.GenerateStreamChunk:
        first_id = None if self._prompt_logprobs else self._first_id
        self._token_ids += gain.token_ids
        self._logprobs += gain.logprobs
        self._prompt_logprobs += gain.prompt_logprobs
        self._cached = gain.cached_tokens
        return vllm.GenerateStreamChunk(
            token_ids=gain.token_ids,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=gain.completion_tokens,
            cached_tokens=gain.cached_tokens,
            output_logprobs=output_logprobs(gain.logprobs),
            input_logprobs=input_logprobs(gain.prompt_logprobs, first_id),
            index=self.index,
        )

    def complete(self, ending: Ending) -> vllm.GenerateComplete:
        message = self._complete("stop" if ending.reason is FinishReason.STOP else "length")
        message.spec_accepted_tokens = ending.accepted_tokens
        message.spec_draft_tokens = ending.draft_tokens
        if ending.stop:
            message.matched_stop_str = ending.stop
        elif ending.stop_token_id >= 0:
            message.matched_token_id = ending.stop_token_id
        return message

    def aborted(self) -> vllm.GenerateComplete:
        return self._complete("abort")

    def _complete(self, finish_reason: str) -> vllm.GenerateComplete:
        self.is_complete = True
        return vllm.GenerateComplete(
            output_ids=self._token_ids,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self._token_ids),
            cached_tokens=self._cached,
            output_logprobs=output_logprobs(self._logprobs),
            input_logprobs=input_logprobs(self._prompt_logprobs, self._first_id),
            index=self.index,
        )


def output_logprobs(entries: list[TokenLogprobs]) -> vllm.OutputLogProbs | None:
    if not entries:
        return None
    return vllm.OutputLogProbs(
        token_logprobs=[entry.logprob for entry in entries],
        token_ids=[entry.token_id for entry in entries],
        top_logprobs=[_top(entry) for entry in entries],
    )


def input_logprobs(entries: list[TokenLogprobs], first_id: int | None) -> vllm.InputLogProbs | None:
    """`first_id` is the prompt's first token, which nothing predicted: it has no value, but a place."""
    if not entries:
        return None
    message = vllm.InputLogProbs()
    if first_id is not None:
        message.token_logprobs.add()
        message.token_ids.append(first_id)
        message.top_logprobs.add()
    message.MergeFrom(
        vllm.InputLogProbs(
            token_logprobs=[vllm.InputTokenLogProb(value=entry.logprob) for entry in entries],
            token_ids=[entry.token_id for entry in entries],
            top_logprobs=[_top(entry) for entry in entries],
        )
    )
    return message


def _top(entry: TokenLogprobs) -> vllm.TopLogProbs:
    return vllm.TopLogProbs(values=entry.top_logprobs, token_ids=entry.top_ids)
