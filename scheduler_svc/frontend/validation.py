"""A client's request → Submits for the engine, or one error that lists every field that is wrong.

Both services come through here: the vLLM one translates its message to ours first and gives its own field names.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import msgspec
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import Grammar, Submit
from protos.wire import Sampling
from scheduler_svc.frontend import grammar_fields, resume, sampling_fields, tools
from scheduler_svc.frontend.chat_template import TemplateRefusedError
from scheduler_svc.frontend.checks import Violations, check_request_id, check_vocabulary
from scheduler_svc.frontend.errors import Violation, invalid
from scheduler_svc.frontend.limits import (
    MAX_CHARACTERS,
    MAX_MESSAGES,
    MAX_PRIORITY,
    MAX_SALT_BYTES,
    MAX_TENANT_BYTES,
)
from scheduler_svc.frontend.model import Defaults, ServedModel
from scheduler_svc.frontend.resume import Resumed


@dataclass(frozen=True)
class Names:
    """What a service calls the fields that both have."""

    sampling: str = "sampling"
    token_ids: str = "token_ids.ids"
    text: str = "text"
    prompt: str = "prompt"
    grammar: str = "structured_output"


NATIVE: Final = Names()
ComputeRequest: TypeAlias = "pb.EmbedRequest | pb.ScoreRequest"
Prompted: TypeAlias = "pb.GenerateRequest | pb.ScoreRequest | pb.EmbedInput"  # whatever has our three kinds of prompt


@dataclass(frozen=True)
class Caller:
    """What a call says besides its request."""

    deadline: float = 0.0  # as in Submit
    tenants: tuple[str, ...] = ()  # every value of the metadata's `tenant`

    @property
    def tenant(self) -> str:
        return self.tenants[0] if self.tenants else ""


@dataclass(frozen=True)
class Computing:
    """A prompt behind which nothing is sampled."""

    token_ids: list[int]
    sampling: Sampling


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
    submits: list[Submit]  # one for each index
    rules: TextRules
    resumed: Mapping[int, Resumed] = field(default_factory=dict)  # by index: what the client has already
    adapter_digest: str = ""
    grammar_field: str = ""  # which holds its grammar


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
        adapter_digest: str = "",
    ) -> Prepared:
        """`defaults` replaces the model's own. `found` is what the caller saw before. `adapter_digest`: of the adapter
        that the request names.

        Raises ServiceError INVALID_ARGUMENT with all violations, `found` included.
        """
        card, tokenizer = self.model.card, self.model.tokenizer
        violations = Violations(found)
        params = request.sampling
        _check_caller(caller, violations)
        _check_identity(request, violations)
        sampling_fields.check_sampling(params, card, names.sampling, violations)
        grammar_field, grammar = grammar_fields.read(
            request, tokenizer.chat_template, names.grammar, names.sampling, violations
        )
        states = resume.read_states(request, names.sampling, card.vocab_size, violations)
        token_ids = await self.prompt(request, violations, names)
        bad_words = await sampling_fields.bad_words(params, tokenizer, names.sampling, violations)
        defaults = card.defaults if defaults is None else defaults
        room = max(self.max_model_len() - len(token_ids), 0)
        max_tokens = min(params.max_tokens if params.HasField("max_tokens") else defaults.max_new_tokens or room, room)
        violations.check()
        if params.min_tokens > max_tokens:
            problem = f"is {params.min_tokens}, but the context leaves room for {max_tokens} output tokens"
            raise invalid([Violation(f"{names.sampling}.min_tokens", problem)])
        seed = params.seed if params.HasField("seed") else self.random_seed()
        sampling = sampling_fields.resolve(params, defaults, card, max_tokens, bad_words)
        resumed = resume.with_ends(states, sampling, violations)
        violations.check()
        return self._prepared(
            request, token_ids, sampling, seed, caller, resumed, adapter_digest, grammar, grammar_field
        )

    def _prepared(
        self,
        request: pb.GenerateRequest,
        token_ids: list[int],
        sampling: Sampling,
        seed: int,
        caller: Caller,
        resumed: Mapping[int, Resumed],
        adapter_digest: str,
        grammar: Grammar | None,
        grammar_field: str,
    ) -> Prepared:
        params = request.sampling
        request_id = request.request_id or uuid.uuid4().hex
        n = params.n if params.HasField("n") else 1
        submits = []
        for index in range(n):
            own = msgspec.structs.replace(sampling, seed=child_seed(seed, index))
            given = token_ids
            if index in resumed:  # its prompt logprobs came before its first token
                own = msgspec.structs.replace(own, prompt_logprobs=-1)
                given = token_ids + resumed[index].token_ids
            submits.append(
                Submit(
                    request_id=request_id,
                    token_ids=given,
                    prompt_len=len(token_ids),
                    sampling=own,
                    index=index,
                    num_siblings=n,
                    priority=request.priority,
                    tenant=caller.tenant,
                    deadline=caller.deadline,
                    cache_salt=request.cache_salt,
                    adapter=request.adapter,
                    adapter_digest=adapter_digest,
                    frontend=self.frontend,
                    skip_cache=own.prompt_logprobs >= 0,
                    grammar=grammar,
                )
            )
        rules = TextRules(
            stop=tuple(dict.fromkeys(params.stop)),
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens if params.HasField("skip_special_tokens") else True,
            min_tokens=params.min_tokens,
        )
        return Prepared(request_id, seed, len(token_ids), submits, rules, resumed, adapter_digest, grammar_field)

    def computing(
        self,
        request: ComputeRequest,
        prompts: Sequence[Computing],
        caller: Caller,
        adapter_digest: str,
        pooling: str = "",
    ) -> Prepared:
        """One sequence a prompt, which samples nothing."""
        request_id, total = request.request_id or uuid.uuid4().hex, sum(len(one.token_ids) for one in prompts)
        submits = [
            Submit(
                request_id=request_id,
                token_ids=one.token_ids,
                prompt_len=len(one.token_ids),
                sampling=one.sampling,
                index=index,
                num_siblings=len(prompts),
                priority=request.priority,
                tenant=caller.tenant,
                deadline=caller.deadline,
                cache_salt=request.cache_salt,
                frontend=self.frontend,
                adapter=request.adapter,
                adapter_digest=adapter_digest,
                pooling=pooling,
                request_tokens=total,
            )
            for index, one in enumerate(prompts)
        ]
        return Prepared(request_id, 0, total, submits, TextRules())

    async def prompt(
        self,
        request: Prompted,
        violations: Violations,
        names: Names = NATIVE,
        spare: int = 1,
        cut: int | None = None,
    ) -> list[int]:
        """Its tokens, which leave `spare` positions of the context; where `cut` is given, the first so many of them."""
        longest, context = self.max_model_len() - spare, None if cut else self.max_model_len()
        match request.WhichOneof("prompt"):
            case "token_ids":
                field, ids = names.token_ids, request.token_ids.ids[:cut]
                if not _fits(field, len(ids), longest, spare, violations):  # before 16 MiB of them become objects
                    return []
                token_ids = list(ids)
                check_vocabulary(field, token_ids, self.model.card.vocab_size, violations)
                if not token_ids:
                    violations.add(field, "is empty; a prompt has at least 1 token")
            case "text":
                field = names.text
                token_ids = await self.tokenize(field, request.text, True, context, violations, cut)
            case "chat":
                field = "chat.messages"
                token_ids = await self.tokenize_chat(request.chat, context, violations, cut)
            case _:
                violations.add(names.prompt, "is not set; give text, token ids or chat messages")
                return []
        _fits(field, len(token_ids), longest, spare, violations)
        return token_ids

    async def tokenize(
        self,
        field: str,
        text: str,
        add_special_tokens: bool,
        max_tokens: int | None,
        violations: Violations,
        cut: int | None = None,
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
        token_ids = await tokenizer.encode_off_loop(text, add_special_tokens, cut)
        if not token_ids:
            violations.add(field, "holds no token")
        elif (most := max(token_ids)) >= (vocab_size := self.model.card.vocab_size):  # the tokenizer may have more
            violations.add(field, f"holds token {most}; the vocabulary has {vocab_size} tokens, from 0")
        return token_ids

    async def tokenize_chat(
        self, chat: pb.ChatMessages, max_tokens: int | None, violations: Violations, cut: int | None = None
    ) -> list[int]:
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
        size = sum(len(message.content) for message in chat.messages)
        most = max_tokens * self.model.tokenizer.longest_token if max_tokens else MAX_CHARACTERS
        if size > most:  # a template may take long over what could never be served
            violations.add("chat.messages", f"have {size} characters; at most {most}")
            return []
        before = len(violations)
        tools.check(chat, template, violations)
        if len(violations) > before:
            return []
        messages = [tools.message(message) for message in chat.messages]
        add_prompt = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        try:
            text = template.render(messages, add_prompt, tools.described(chat))
        except TemplateRefusedError as error:
            violations.add("chat", f"the model's chat template refuses these messages: {error}")
            return []
        return await self.tokenize("chat.messages", text, False, max_tokens, violations, cut)


def _fits(field: str, count: int, longest: int, spare: int, violations: Violations) -> bool:
    if count <= longest:
        return True
    limit = f"at most {longest} leave room for one more within" if spare else f"at most {longest} fit into"
    violations.add(field, f"has {count} tokens; {limit} the context")
    return False


def check_computing(request: ComputeRequest, caller: Caller, violations: Violations) -> None:
    _check_caller(caller, violations)
    _check_identity(request, violations)


def _check_caller(caller: Caller, violations: Violations) -> None:
    field, tenant = "metadata tenant", caller.tenant
    if len(caller.tenants) > 1:
        violations.add(field, f"has {len(caller.tenants)} values; a call is of one tenant")
    elif len(tenant) > MAX_TENANT_BYTES:
        violations.add(field, f"has {len(tenant)} characters; at most {MAX_TENANT_BYTES}")
    elif not (tenant.isascii() and tenant.isprintable()):
        violations.add(field, "must be printable ASCII")


def _check_identity(request: pb.GenerateRequest | ComputeRequest, violations: Violations) -> None:
    check_request_id("request_id", request.request_id, violations)
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        violations.add("priority", f"is {request.priority}; must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    if (size := len(request.cache_salt.encode())) > MAX_SALT_BYTES:
        violations.add("cache_salt", f"has {size} bytes; at most {MAX_SALT_BYTES}")
