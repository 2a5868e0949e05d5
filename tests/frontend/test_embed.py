"""Embed and Score over a real server: what the engine is asked, what the client gets, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import numpy as np
import pytest
import tokenizers
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from pagewire.v1 import inference_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]

from protos.engine_wire import FinishReason, TokenDelta
from protos.wire import Sampling
from scheduler_svc.frontend import pooling_config
from scheduler_svc.frontend.embedding import VectorForm
from scheduler_svc.frontend.pooling_config import PoolingDefault
from scheduler_svc.frontend.tokenizer import Tokenizer
from tests.frontend.conftest import Service, byte_model, open_service
from tests.frontend.scripted import READY


def ids(*values: int) -> pb.TokenIds:
    return pb.TokenIds(ids=values)


def inputs(*prompts: list[int] | str) -> list[pb.EmbedInput]:
    return [
        pb.EmbedInput(text=prompt) if isinstance(prompt, str) else pb.EmbedInput(token_ids=ids(*prompt))
        for prompt in prompts
    ]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), str(caught.value.details())


async def violations(call: Any) -> list[str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    return [violation.field for violation in bad.field_violations]


async def test_each_input_is_one_sequence_of_one_request(service: Service) -> None:
    chat = pb.EmbedInput(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x")]))
    request = pb.EmbedRequest(inputs=[*inputs([7, 8, 9], "ab"), chat], priority=2, cache_salt="s", normalize=False)
    response = await service.inference.Embed(request, metadata=(("tenant", "t"),))
    assert [list(e.values) for e in response.embeddings] == [[3, 4, 7, 3], [3, 4, 97, 2], [3, 4, 117, 8]]
    assert [e.prompt_tokens for e in response.embeddings] == [3, 2, 8], "no opening of an answer"
    assert (response.usage.prompt_tokens, response.usage.cached_tokens) == (13, 6)
    assert len({submit.request_id for submit in service.engine.submits}) == 1
    for i, submit in enumerate(service.engine.submits):
        assert (submit.index, submit.num_siblings, submit.request_tokens) == (i, 3, 13)
        assert (submit.tenant, submit.priority, submit.cache_salt, submit.pooling) == ("t", 2, "s", "last")
        assert submit.sampling == Sampling(max_tokens=0)


@pytest.mark.parametrize(("pooling", "first"), [(pb.POOLING_MEAN, -3.0), (pb.POOLING_CLS, 6.0)])
async def test_vectors_are_cut_and_then_brought_to_length_one(service: Service, pooling: Any, first: float) -> None:
    request = pb.EmbedRequest(inputs=inputs([7]), pooling=pooling, dimensions=2)
    response = await service.inference.Embed(request)
    expected = np.array([first, 4.0]) / math.hypot(first, 4.0)
    assert list(response.embeddings[0].values) == pytest.approx(expected.tolist(), abs=1e-7)


def test_a_vector_of_zeros_stays_one() -> None:
    assert VectorForm(2).vector(bytes(16)) == [0.0, 0.0]


async def test_an_input_may_fill_the_context_and_is_cut_on_demand(service: Service) -> None:
    (whole,) = (await service.inference.Embed(pb.EmbedRequest(inputs=inputs([7] * 256)))).embeddings
    assert whole.prompt_tokens == 256
    assert await violations(service.inference.Embed(pb.EmbedRequest(inputs=inputs([7], [7] * 257)))) == [
        "inputs[1].token_ids.ids"
    ]
    request = pb.EmbedRequest(inputs=inputs([7] * 257, "abc" * 200), truncate_prompt_tokens=4)
    await service.inference.Embed(request)
    assert [submit.token_ids for submit in service.engine.submits[-2:]] == [[7] * 4, [97, 98, 99, 97]]


def test_what_closes_a_text_stays_where_it_is_cut() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, "?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    one = Tokenizer(backend, None, {})
    found = {cut: one.encode("a b b", True, cut) for cut in (1, 3, 4, 5, None)}
    assert found == {1: [1], 3: [0, 2, 1], 4: [0, 2, 3, 1], 5: [0, 2, 3, 3, 1], None: [0, 2, 3, 3, 1]}


async def test_what_is_wrong_is_listed(service: Service) -> None:
    embed, score = service.inference.Embed, service.inference.Score
    request = pb.EmbedRequest(dimensions=5, truncate_prompt_tokens=257, request_id=" ", priority=101)
    named = ["request_id", "priority", "inputs", "truncate_prompt_tokens", "dimensions"]
    assert await violations(embed(request)) == named
    assert await violations(embed(pb.EmbedRequest(inputs=inputs([7]), truncate_prompt_tokens=0))) == [
        "truncate_prompt_tokens"
    ]
    assert await violations(embed(pb.EmbedRequest(inputs=inputs([7]), pooling=9))) == ["pooling"]  # type: ignore[arg-type]
    assert await violations(embed(pb.EmbedRequest(inputs=inputs(*[[7]] * 257)))) == ["inputs"]
    assert await violations(embed(pb.EmbedRequest(inputs=[pb.EmbedInput()]))) == ["inputs[0].prompt"]
    assert await violations(embed(pb.EmbedRequest(inputs=inputs([512], "")))) == [
        "inputs[0].token_ids.ids[0]",
        "inputs[1].text",
    ]
    assert await violations(score(pb.ScoreRequest(text="a"))) == ["candidates"]
    bad = [pb.ScoreCandidate(), pb.ScoreCandidate(token_ids=ids()), pb.ScoreCandidate(token_ids=ids(512))]
    assert await violations(score(pb.ScoreRequest(candidates=bad))) == [
        "prompt",
        "candidates[0]",
        "candidates[1].token_ids.ids",
        "candidates[2].token_ids.ids[0]",
    ]
    fits, more = (pb.ScoreCandidate(token_ids=ids(*[5] * count)) for count in (6, 7))
    assert await violations(score(pb.ScoreRequest(token_ids=ids(*[7] * 250), candidates=[fits, more]))) == [
        "candidates[1]"
    ]


async def test_candidates_are_scored_behind_one_prompt(service: Service) -> None:
    candidates = [pb.ScoreCandidate(text="xy"), pb.ScoreCandidate(token_ids=ids(5, 6, 7))]
    response = await service.inference.Score(pb.ScoreRequest(text="abc", candidates=candidates))
    assert [submit.token_ids for submit in service.engine.submits] == [
        [97, 98, 99, 120, 121],
        [97, 98, 99, 5, 6, 7],
    ]
    for submit in service.engine.submits:
        assert submit.sampling == Sampling(max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=3)
        assert (submit.skip_cache, submit.pooling) == (False, "")
    first, second = response.scores
    assert (list(first.token_ids), list(second.token_ids)) == ([120, 121], [5, 6, 7])
    assert list(first.logprobs) == [2.5, 3.5], "as the script has them"
    assert (first.sum, first.mean) == (6.0, 3.0)
    assert (response.usage.prompt_tokens, response.usage.cached_tokens) == (3 + 2 + 3, 4)


async def test_a_client_that_leaves_ends_its_sequences(service: Service) -> None:
    service.engine.held = True
    call = service.inference.Embed(pb.EmbedRequest(inputs=inputs([7], [8])))
    await service.engine.submit_seen.wait()
    call.cancel()
    await service.engine.abort_seen.wait()
    assert not service.engine.sequences


async def test_overload_is_told_as_to_generate(service: Service) -> None:
    service.engine.finish_with = TokenDelta("", 0, [], finish_reason=FinishReason.REJECTED, retry_after=3.0)
    code, _ = await refused(service.inference.Embed(pb.EmbedRequest(inputs=inputs([7], [8]))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_it_waits_for_the_first_worker_and_its_word(loading_service: Service) -> None:
    call = asyncio.ensure_future(loading_service.inference.Embed(pb.EmbedRequest(inputs=inputs([7]))))
    done, _ = await asyncio.wait([call], timeout=0.1)
    assert not done
    loading_service.engine.say(True)
    assert len((await call).embeddings) == 1


async def test_a_worker_that_pools_nothing_is_named(service: Service) -> None:
    service.engine.say(True, msgspec.structs.replace(READY, hidden_size=0, backend="cuda"))
    code, detail = await refused(service.inference.Embed(pb.EmbedRequest(inputs=inputs([7]))))
    assert (code, detail) == (grpc.StatusCode.FAILED_PRECONDITION, "the cuda backend makes no embeddings")


async def test_the_models_own_pooling_or_why_not() -> None:
    model = byte_model()
    for default, works in ((PoolingDefault("cls"), True), (PoolingDefault(trouble="it pools by max"), False)):
        own = dataclasses.replace(model, card=dataclasses.replace(model.card, pooling=default))
        service = await open_service(own)
        request = pb.EmbedRequest(inputs=inputs([7]))
        if works:
            await service.inference.Embed(request)
            assert service.engine.submits[-1].pooling == "cls"
        else:
            code, detail = await refused(service.inference.Embed(request))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert detail.startswith("it pools by max; name a pooling")
        request.pooling = pb.POOLING_MEAN
        await service.inference.Embed(request)
        assert service.engine.submits[-1].pooling == "mean"
        await service.channel.close()
        await service.frontend.stop()


@pytest.mark.parametrize(
    ("config", "modules", "found"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, [], PoolingDefault("mean")),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, ["Normalize"], PoolingDefault("last")),
        ({"pooling_mode": "cls", "include_prompt": True}, [], PoolingDefault("cls")),
        (
            {"pooling_mode_max_tokens": True},
            [],
            PoolingDefault(trouble="1_Pooling/config.json asks for max_tokens, which is not served"),
        ),
        ({}, ["Dense"], PoolingDefault(trouble="modules.json has the module Dense, which is not served")),
    ],
)
def test_the_layout_of_sentence_transformers(
    config: dict[str, object], modules: list[str], found: PoolingDefault, tmp_path: Path
) -> None:
    kinds = ["Transformer", "Pooling", *modules]
    listed = [{"path": f"{i}_{kind}" if i else "", "type": f"a.models.{kind}"} for i, kind in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert pooling_config.of_directory(tmp_path) == found


def test_without_such_files_it_is_the_last_state(tmp_path: Path) -> None:
    assert pooling_config.of_directory(tmp_path) == PoolingDefault("last")
    assert pooling_config.of_gguf({"qwen3.pooling_type": 1}, "qwen3") == PoolingDefault("mean")
    assert pooling_config.of_gguf({"qwen3.pooling_type": 4}, "qwen3").trouble


async def test_vllms_embed(service: Service) -> None:
    embed = service.channel.unary_unary(
        "/vllm.grpc.engine.VllmEngine/Embed", vllm.EmbedRequest.SerializeToString, vllm.EmbedResponse.FromString
    )
    given = vllm.TokenizedInput(input_ids=[7, 8, 9])
    response = await embed(vllm.EmbedRequest(request_id="r", tokenized=given))
    vector = np.array([3.0, 4.0, 7.0, 3.0])
    assert list(response.embedding) == pytest.approx((vector / np.linalg.norm(vector)).tolist(), abs=1e-7)
    assert (response.prompt_tokens, response.embedding_dim) == (3, 4)
    assert service.engine.submits[-1].request_id == "r"
    assert await violations(embed(vllm.EmbedRequest())) == ["tokenized.input_ids"]
