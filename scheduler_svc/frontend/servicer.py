"""`pagewire.v1.InferenceService`."""

from __future__ import annotations

from typing import Final

import grpc
from pagewire.v1 import inference_pb2
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason
from protos.wire import TokenLogprobs
from scheduler_svc.frontend import embedding, rpc, scoring
from scheduler_svc.frontend.checks import Violations, check_request_id, check_vocabulary
from scheduler_svc.frontend.core import Core
from scheduler_svc.frontend.errors import Context, not_found
from scheduler_svc.frontend.limits import MAX_DETOKENIZE
from scheduler_svc.frontend.streams import Ending, Gain

INFERENCE: Final = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceService:
    def __init__(self, core: Core) -> None:
        self.core = core

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            INFERENCE,
            {
                "Generate": rpc.server_stream(pb.GenerateRequest, self.generate),
                "Embed": rpc.unary(pb.EmbedRequest, self.embed),
                "Score": rpc.unary(pb.ScoreRequest, self.score),
                "Tokenize": rpc.unary(pb.TokenizeRequest, self.tokenize),
                "Detokenize": rpc.unary(pb.DetokenizeRequest, self.detokenize),
                "GetModel": rpc.unary(pb.GetModelRequest, self.get_model),
                "CancelGeneration": rpc.unary(pb.CancelGenerationRequest, self.cancel_generation),
            },
        )

    async def generate(self, request: pb.GenerateRequest, context: Context) -> None:
        caller = self.core.caller(context)
        self.core.gate.check(caller, request.priority, request.sampling.n or 1)
        await self.core.check_resume(request)
        prepared = await self.core.preparer.prepare(request, caller)
        async with self.core.call(prepared, context) as call:
            async for output in self.core.outputs(call, context):
                match output:
                    case Gain():
                        response = pb.GenerateResponse(delta=delta_message(output))
                    case Ending():
                        response = pb.GenerateResponse(finished=finished_message(output, prepared.prompt_len))
                await context.write(response.SerializeToString())

    async def embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        caller = self.core.caller(context)
        self.core.gate.check(caller, request.priority, len(request.inputs))
        prepared, form = await embedding.prepare(self.core, request, caller)
        return embedding.response(prepared, form, await self.core.computed(prepared, context))

    async def score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        caller = self.core.caller(context)
        self.core.gate.check(caller, request.priority, len(request.candidates))
        prepared = await scoring.prepare(self.core, request, caller)
        return scoring.response(prepared, await self.core.computed(prepared, context))

    async def tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        violations, preparer = Violations(), self.core.preparer
        token_ids: list[int] = []
        match request.WhichOneof("input"):
            case "text":
                add_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
                token_ids = await preparer.tokenize("text", request.text, add_special, None, violations)
            case "chat":
                if request.HasField("add_special_tokens"):
                    violations.add("add_special_tokens", "goes with text only; a chat template writes its own")
                token_ids = await preparer.tokenize_chat(request.chat, None, violations)
            case _:
                violations.add("input", "is not set; give text or chat messages")
        violations.check()
        return pb.TokenizeResponse(token_ids=token_ids)

    async def detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        violations, model = Violations(), self.core.model
        if (count := len(request.token_ids)) > MAX_DETOKENIZE:
            violations.add("token_ids", f"has {count} ids; at most {MAX_DETOKENIZE}")
        else:
            check_vocabulary("token_ids", request.token_ids, model.card.vocab_size, violations)
        violations.check()
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        return pb.DetokenizeResponse(text=await model.tokenizer.decode_off_loop(list(request.token_ids), skip))

    async def get_model(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        core, card = self.core, self.core.model.card
        response = pb.GetModelResponse(
            name=core.name,
            path=card.path,
            architecture=card.architecture,
            max_model_len=core.max_model_len(),
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
            quantization=card.quantization,
            has_chat_template=core.model.tokenizer.chat_template is not None,
        )
        if ready := core.ready:
            response.dtype, response.backend, response.device = ready.dtype, ready.backend, ready.device
            response.quantization = ready.quantization or card.quantization
            response.kv_cache_dtype = ready.kv_dtype or ready.dtype
            response.fingerprint, response.exact = ready.fingerprint, ready.exact
        return response

    async def cancel_generation(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        violations = Violations()
        check_request_id("request_id", request.request_id, violations)
        if not request.request_id:
            violations.add("request_id", "is empty")
        violations.check()
        if not await self.core.cancel(request.request_id):
            raise not_found(f"no request {request.request_id!r} is running")
        return pb.CancelGenerationResponse()


def delta_message(gain: Gain) -> pb.GenerateDelta:
    return pb.GenerateDelta(
        index=gain.index,
        token_ids=gain.token_ids,
        text=gain.text,
        logprobs=[logprob_message(entry) for entry in gain.logprobs],
        prompt_logprobs=[logprob_message(entry) for entry in gain.prompt_logprobs],
    )


def logprob_message(entry: TokenLogprobs) -> pb.TokenLogprob:
    top = [
        pb.TopLogprob(token_id=token_id, logprob=logprob)
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
    ]
    return pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob, rank=entry.rank, top=top)


def finished_message(ending: Ending, prompt_tokens: int) -> pb.GenerateFinished:
    is_stop = ending.reason is FinishReason.STOP
    message = pb.GenerateFinished(
        index=ending.index,
        finish_reason=pb.FINISH_REASON_STOP if is_stop else pb.FINISH_REASON_LENGTH,
        usage=pb.Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=ending.cached_tokens,
            completion_tokens=ending.completion_tokens,
            draft_tokens=ending.draft_tokens,
            accepted_tokens=ending.accepted_tokens,
        ),
        timings=pb.Timings(first_token=ending.first_token, total=ending.total),
    )
    if ending.stop:
        message.stop = ending.stop
    elif ending.stop_token_id >= 0:
        message.stop_token_id = ending.stop_token_id
    return message
