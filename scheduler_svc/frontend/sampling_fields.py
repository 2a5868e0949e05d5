"""SamplingParams: what each field may hold, and what a request means by those that it leaves unset."""

from __future__ import annotations

from typing import Final

from pagewire.v1 import inference_pb2 as pb

from protos.wire import Sampling
from scheduler_svc.frontend.checks import Violations, check_strings, check_vocabulary
from scheduler_svc.frontend.limits import (
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_BIASES,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_STRING,
    RANGES,
)
from scheduler_svc.frontend.model import Defaults, ModelCard
from scheduler_svc.frontend.tokenizer import Tokenizer

GREEDY_BELOW: Final = 1e-5  # a smaller temperature would overflow the logits; vLLM draws the same line


def check_sampling(params: pb.SamplingParams, card: ModelCard, prefix: str, violations: Violations) -> None:
    for name, allowed in RANGES.items():
        if params.HasField(name) and (value := getattr(params, name)) not in allowed:
            violations.add(f"{prefix}.{name}", f"is {value:g}; must be in {allowed}")
    if params.HasField("max_tokens") and params.max_tokens == 0:
        violations.add(f"{prefix}.max_tokens", "is 0; must be at least 1")
    elif params.HasField("max_tokens") and params.min_tokens > params.max_tokens:
        violations.add(f"{prefix}.min_tokens", f"is {params.min_tokens}, more than max_tokens, {params.max_tokens}")
    _check_bias(params, card, prefix, violations)
    check_strings(f"{prefix}.stop", params.stop, MAX_STOPS, violations)
    check_strings(f"{prefix}.bad_words", params.bad_words, MAX_BAD_WORDS, violations)
    if len(params.stop_token_ids) > MAX_STOP_IDS:
        violations.add(f"{prefix}.stop_token_ids", f"has {len(params.stop_token_ids)} ids; at most {MAX_STOP_IDS}")
        return
    check_vocabulary(f"{prefix}.stop_token_ids", params.stop_token_ids, card.vocab_size, violations)


def _check_bias(params: pb.SamplingParams, card: ModelCard, prefix: str, violations: Violations) -> None:
    if len(params.logit_bias) > MAX_BIASES:
        violations.add(f"{prefix}.logit_bias", f"has {len(params.logit_bias)} entries; at most {MAX_BIASES}")
        return
    for token_id, bias in sorted(params.logit_bias.items()):
        field = f"{prefix}.logit_bias[{token_id}]"
        if token_id >= card.vocab_size:
            violations.add(field, f"names a token beyond the vocabulary of {card.vocab_size}")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            violations.add(field, f"is {bias:g}; must be in [-{MAX_BIAS:g}, {MAX_BIAS:g}]")


async def bad_words(
    params: pb.SamplingParams, tokenizer: Tokenizer, prefix: str, violations: Violations
) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens as it stands at the beginning of a text, and behind a space."""
    if len(params.bad_words) > MAX_BAD_WORDS:
        return ()
    words = {i: word for i, word in enumerate(params.bad_words) if 1 <= len(word) <= MAX_STRING}
    texts = [lead + word.lstrip() for word in words.values() if word.strip() for lead in ("", " ")]
    variants = dict(zip(texts, map(tuple, await tokenizer.encode_all_off_loop(texts)), strict=True))
    sequences: dict[tuple[int, ...], None] = {}
    for i, word in words.items():
        found = [variants.get(lead + word.lstrip(), ()) for lead in ("", " ")] if word.strip() else []
        if not any(found):
            violations.add(f"{prefix}.bad_words[{i}]", "holds no token")
        sequences.update(dict.fromkeys(variant for variant in found if variant))
    return tuple(sequences)


def resolve(
    params: pb.SamplingParams,
    defaults: Defaults,
    card: ModelCard,
    max_tokens: int,
    bad_words: tuple[tuple[int, ...], ...],
) -> Sampling:
    def given(name: str, default: float | None, otherwise: float) -> float:
        value: float = getattr(params, name)
        return value if params.HasField(name) else otherwise if default is None else default

    temperature = given("temperature", defaults.temperature, 1.0)
    top_k = int(given("top_k", defaults.top_k, 0))
    return Sampling(
        max_tokens=max_tokens,
        bad_words=bad_words,
        logit_bias=tuple(sorted(params.logit_bias.items())),
        min_tokens=params.min_tokens,
        repetition_penalty=given("repetition_penalty", defaults.repetition_penalty, 1.0),
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        min_p=given("min_p", defaults.min_p, 0.0),
        top_k=top_k if 0 < top_k < card.vocab_size else 0,
        top_p=given("top_p", defaults.top_p, 1.0),
        stop_token_ids=tuple(dict.fromkeys(params.stop_token_ids)),
        eos_token_ids=() if params.ignore_eos else card.eos_token_ids,
        logprobs=params.logprobs if params.HasField("logprobs") else -1,
        prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else -1,
    )
