"""A client's request → Submits for the engine, or one error that lists every field that is wrong.

Both services come through here: the vLLM one translates its message to ours first and gives its own field names.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import Submit
from protos.wire import Sampling
from scheduler_svc.frontend.chat_template import TemplateRefusedError
from scheduler_svc.frontend.errors import Violation, invalid
from scheduler_svc.frontend.limits import (
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_BIASES,
    MAX_CHARACTERS,
    MAX_ID_BYTES,
    MAX_MESSAGES,
    MAX_PRIORITY,
    MAX_SALT_BYTES,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_STRING,
    MAX_TENANT_BYTES,
    RANGES,
)
from scheduler_svc.frontend.model import Defaults, ModelCard, ServedModel
from scheduler_svc.frontend.tokenizer import Tokenizer

GREEDY_BELOW: Final = 1e-5  # a smaller temperature would overflow the logits; vLLM draws the same line


@dataclass(frozen=True)
class Names:
    """What a service calls the fields that both have."""

    sampling: str = "sampling"
    token_ids: str = "token_ids.ids"
    text: str = "text"
    prompt: str = "prompt"


NATIVE: Final = Names()


@dataclass(frozen=True)
class Caller:
    """What a call says besides its request."""

    deadline: float = 0.0  # as in Submit
    tenants: tuple[str, ...] = ()  # every value of the metadata's `tenant`

    @property
    def tenant(self) -> str:
        return self.tenants[0] if self.tenants else ""


@dataclass(frozen=True)
class TextRules:
    """What the frontend itself does with a stream."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # stop strings are looked for behind so many output tokens


@dataclass(frozen=True)
class Prepared:
    request_id: str
    seed: int
    prompt_len: int
    submits: list[Submit]
    rules: TextRules


class Violations(list[Violation]):
    def add(self, field: str, problem: str) -> None:
        self.append(Violation(field, problem))

    def check(self) -> None:
        if self:
            raise invalid(self)


def random_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")


def child_seed(seed: int, index: int) -> int:
    """The seed of stream `index`. Index 0 keeps the request's own: a request of one stream is the plain case."""
    if index == 0:
        return seed
    data = seed.to_bytes(8, "little") + index.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Preparer:
    """Turns requests into Submits for one model. `max_model_len` is asked anew each time: the worker decides."""

    model: ServedModel
    max_model_len: Callable[[], int]
    frontend: str = ""
    random_seed: Callable[[], int] = random_seed

    async def prepare(
        self,
        request: pb.GenerateRequest,
        caller: Caller,
        names: Names = NATIVE,
        defaults: Defaults | None = None,
        found: Sequence[Violation] = (),
    ) -> Prepared:
        """`defaults` replaces the model's own. `found` is what the caller saw before.

        Raises ServiceError INVALID_ARGUMENT with all violations, `found` included.
        """
        card, tokenizer = self.model.card, self.model.tokenizer
        violations = Violations(found)
        params = request.sampling
        _check_caller(caller, violations)
        _check_identity(request, violations)
        _check_not_served(request, violations)
        _check_sampling(params, card, names.sampling, violations)
        max_model_len = self.max_model_len()
        token_ids = await self._prompt(request, names, max_model_len, violations)
        bad_words = _bad_words(params, tokenizer, names.sampling, violations)
        defaults = card.defaults if defaults is None else defaults
        room = max(max_model_len - len(token_ids), 0)
        max_tokens = min(params.max_tokens if params.HasField("max_tokens") else defaults.max_new_tokens or room, room)
        violations.check()
        if params.min_tokens > max_tokens:
            problem = f"is {params.min_tokens}, but the context leaves room for {max_tokens} output tokens"
            raise invalid([Violation(f"{names.sampling}.min_tokens", problem)])
        seed = params.seed if params.HasField("seed") else self.random_seed()
        sampling = _sampling(params, defaults, card, max_tokens, bad_words)
        return self._prepared(request, token_ids, sampling, seed, caller)

    def _prepared(
        self, request: pb.GenerateRequest, token_ids: list[int], sampling: Sampling, seed: int, caller: Caller
    ) -> Prepared:
        params = request.sampling
        request_id = request.request_id or uuid.uuid4().hex
        n = params.n if params.HasField("n") else 1
        submits = [
            Submit(
                request_id=request_id,
                token_ids=token_ids,
                prompt_len=len(token_ids),
                sampling=msgspec.structs.replace(sampling, seed=child_seed(seed, index)),
                index=index,
                num_siblings=n,
                priority=request.priority,
                tenant=caller.tenant,
                deadline=caller.deadline,
                cache_salt=request.cache_salt,
                frontend=self.frontend,
                skip_cache=sampling.prompt_logprobs >= 0,
            )
            for index in range(n)
        ]
        rules = TextRules(
            stop=tuple(dict.fromkeys(params.stop)),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens if params.HasField("skip_special_tokens") else True,
            min_tokens=params.min_tokens,
        )
        return Prepared(request_id, seed, len(token_ids), submits, rules)

    async def _prompt(
        self, request: pb.GenerateRequest, names: Names, max_model_len: int, violations: Violations
    ) -> list[int]:
        match request.WhichOneof("prompt"):
            case "token_ids":
                field, token_ids = names.token_ids, list(request.token_ids.ids)
                check_vocabulary(field, token_ids, self.model.card.vocab_size, violations)
                if not token_ids:
                    violations.add(field, "is empty; a prompt has at least 1 token")
            case "text":
                field = names.text
                token_ids = await self.tokenize(field, request.text, True, max_model_len, violations)
            case "chat":
                field = "chat.messages"
                token_ids = await self.tokenize_chat(request.chat, max_model_len, violations)
            case _:
                violations.add(names.prompt, "is not set; give text, token ids or chat messages")
                return []
        if len(token_ids) + 1 > max_model_len:
            violations.add(
                field,
                f"has {len(token_ids)} tokens; at most {max_model_len - 1} leave room for one more within the context",
            )
        return token_ids

    async def tokenize(
        self, field: str, text: str, add_special_tokens: bool, max_tokens: int | None, violations: Violations
    ) -> list[int]:
        """[] with a violation for an empty text, and for one that must be longer than `max_tokens`.

        Where `max_tokens` is None, MAX_CHARACTERS is the bound.
        """
        tokenizer = self.model.tokenizer
        if not text:
            violations.add(field, "is empty")
            return []
        if max_tokens is None and len(text) > MAX_CHARACTERS:
            violations.add(field, f"has {len(text)} characters; at most {MAX_CHARACTERS}")
            return []
        if max_tokens and len(text) > max_tokens * tokenizer.longest_token:
            violations.add(field, f"has {len(text)} characters, more than {max_tokens} tokens can hold")
            return []
        token_ids = await tokenizer.encode_off_loop(text, add_special_tokens)
        if not token_ids:
            violations.add(field, "holds no token")
        elif (most := max(token_ids)) >= (vocab_size := self.model.card.vocab_size):  # the tokenizer may have more
            violations.add(field, f"holds token {most}; the vocabulary has {vocab_size} tokens, from 0")
        return token_ids

    async def tokenize_chat(self, chat: pb.ChatMessages, max_tokens: int | None, violations: Violations) -> list[int]:
        template = self.model.tokenizer.chat_template
        if template is None:
            violations.add("chat", "the model has no chat template; send text or token ids")
            return []
        if not chat.messages:
            violations.add("chat.messages", "is empty; give at least 1 message")
            return []
        if len(chat.messages) > MAX_MESSAGES:
            violations.add("chat.messages", f"has {len(chat.messages)} messages; at most {MAX_MESSAGES}")
            return []
        unnamed = [i for i, message in enumerate(chat.messages) if not message.role]
        for i in unnamed:
            violations.add(f"chat.messages[{i}].role", "is empty")
        if unnamed:
            return []
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        add_prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        try:
            text = template.render(messages, add_prompt)
        except TemplateRefusedError as error:
            violations.add("chat", f"the model's chat template refuses these messages: {error}")
            return []
        return await self.tokenize("chat.messages", text, False, max_tokens, violations)


def check_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int, violations: Violations) -> None:
    if token_ids and max(token_ids) >= vocab_size:
        i = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        violations.add(f"{field}[{i}]", f"is {token_ids[i]}; the vocabulary has {vocab_size} tokens, from 0")


def _check_caller(caller: Caller, violations: Violations) -> None:
    field, tenant = "metadata tenant", caller.tenant
    if len(caller.tenants) > 1:
        violations.add(field, f"has {len(caller.tenants)} values; a call is of one tenant")
    elif len(tenant) > MAX_TENANT_BYTES:
        violations.add(field, f"has {len(tenant)} characters; at most {MAX_TENANT_BYTES}")
    elif not (tenant.isascii() and tenant.isprintable()):
        violations.add(field, "must be printable ASCII")


def _check_identity(request: pb.GenerateRequest, violations: Violations) -> None:
    check_request_id("request_id", request.request_id, violations)
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        violations.add("priority", f"is {request.priority}; must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    if (size := len(request.cache_salt.encode())) > MAX_SALT_BYTES:
        violations.add("cache_salt", f"has {size} bytes; at most {MAX_SALT_BYTES}")


def check_request_id(field: str, request_id: str, violations: Violations) -> None:
    """An id is echoed in metadata, which carries printable ASCII only."""
    if len(request_id) > MAX_ID_BYTES:
        violations.add(field, f"has {len(request_id)} characters; at most {MAX_ID_BYTES}")
    elif not (request_id.isascii() and request_id.isprintable()) or request_id != request_id.strip():
        violations.add(field, "must be printable ASCII without spaces at its ends")


def _check_not_served(request: pb.GenerateRequest, violations: Violations) -> None:
    given = {
        "structured_output": request.HasField("structured_output"),
        "adapter": bool(request.adapter),
        "resume_token_ids": bool(request.resume_token_ids),
        "resume_fingerprint": bool(request.resume_fingerprint),
        "allow_inexact_resume": request.allow_inexact_resume,
    }
    for field in (name for name, is_given in given.items() if is_given):
        violations.add(field, "is not served yet; leave it unset")


def _check_sampling(params: pb.SamplingParams, card: ModelCard, prefix: str, violations: Violations) -> None:
    for name, allowed in RANGES.items():
        if params.HasField(name) and (value := getattr(params, name)) not in allowed:
            violations.add(f"{prefix}.{name}", f"is {value:g}; must be in {allowed}")
    if params.HasField("max_tokens") and params.max_tokens == 0:
        violations.add(f"{prefix}.max_tokens", "is 0; must be at least 1")
    elif params.HasField("max_tokens") and params.min_tokens > params.max_tokens:
        violations.add(f"{prefix}.min_tokens", f"is {params.min_tokens}, more than max_tokens, {params.max_tokens}")
    _check_bias(params, card, prefix, violations)
    _check_strings(f"{prefix}.stop", params.stop, MAX_STOPS, violations)
    _check_strings(f"{prefix}.bad_words", params.bad_words, MAX_BAD_WORDS, violations)
    if len(params.stop_token_ids) > MAX_STOP_IDS:
        violations.add(f"{prefix}.stop_token_ids", f"has {len(params.stop_token_ids)} ids; at most {MAX_STOP_IDS}")
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


def _check_strings(field: str, strings: Sequence[str], most: int, violations: Violations) -> None:
    if len(strings) > most:
        violations.add(field, f"has {len(strings)} strings; at most {most}")
        return
    for i, string in enumerate(strings):
        if not 1 <= len(string) <= MAX_STRING:
            violations.add(f"{field}[{i}]", f"has {len(string)} characters; must have 1 to {MAX_STRING}")


def _bad_words(
    params: pb.SamplingParams, tokenizer: Tokenizer, prefix: str, violations: Violations
) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens as it stands at the beginning of a text, and behind a space."""
    sequences: dict[tuple[int, ...], None] = {}
    if len(params.bad_words) > MAX_BAD_WORDS:
        return ()
    for i, word in enumerate(params.bad_words):
        if not 1 <= len(word) <= MAX_STRING:
            continue
        variants = [tuple(tokenizer.encode(lead + word.lstrip(), False)) for lead in ("", " ") if word.strip()]
        if not any(variants):
            violations.add(f"{prefix}.bad_words[{i}]", "holds no token")
        sequences.update(dict.fromkeys(variant for variant in variants if variant))
    return tuple(sequences)


def _sampling(
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
