"""Text ↔ token ids for one model: from a Hugging Face directory, or from the metadata of a GGUF file."""

from __future__ import annotations

import asyncio
import json
import reprlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jinja2
import tokenizers

from scheduler_svc.frontend import detokenizer, gguf_tokenizer
from scheduler_svc.frontend.chat_template import ChatTemplate
from scheduler_svc.frontend.config_fields import METADATA, optional, parse_object, token_ids
from scheduler_svc.frontend.detokenizer import Detokenizer, Vocabulary

# Encoding costs about 1 µs a character: longer texts go to a thread, so that no stream waits for a stranger's prompt.
INLINE_CHARACTERS: Final = 2_000
INLINE_TOKENS: Final = 2_000
NAMED_TEMPLATE: Final = "must be an object with the strings name and template"
BUNDLE_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be read or is not supported, in one line."""


class Tokenizer:
    """`files` is what a router needs to build the same tokenizer: file name to contents."""

    def __init__(
        self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None, files: dict[str, bytes]
    ) -> None:
        self._backend = backend
        self.chat_template = chat_template
        self.files = files
        self.size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        tokens = [backend.id_to_token(i) for i in range(self.size)]
        self.longest_token = max(len(token or "") for token in tokens)
        added = backend.get_added_tokens_decoder()
        special = frozenset(i for i, token in added.items() if token.special)
        self._vocabulary = _vocabulary(backend, tokens, special)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    def encode(self, text: str, add_special_tokens: bool = True, cut: int | None = None) -> list[int]:
        """`cut`: at most so many tokens, the special ones at the ends among them."""
        return _within(self._backend.encode(text, add_special_tokens=add_special_tokens), cut)

    async def encode_off_loop(self, text: str, add_special_tokens: bool = True, cut: int | None = None) -> list[int]:
        """`encode`, in a thread where the text is long."""
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, add_special_tokens, cut)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_without_gil, text, add_special_tokens, cut)

    async def encode_all_off_loop(self, texts: Sequence[str]) -> list[list[int]]:
        """Without special tokens; in a thread where they are long together."""
        if sum(map(len, texts)) <= INLINE_CHARACTERS:
            return [self.encode(text, False) for text in texts]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode_all_without_gil, texts)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def decode_off_loop(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """`decode`, in a thread where the ids are many."""
        if len(token_ids) <= INLINE_TOKENS:
            return self.decode(token_ids, skip_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._decode_without_gil, token_ids, skip_special_tokens)

    # `tokenizers` holds the GIL while it encodes or decodes one, and gives it up only for batches.

    def _encode_without_gil(self, text: str, add_special_tokens: bool, cut: int | None) -> list[int]:
        return _within(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0], cut)

    def _encode_all_without_gil(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode_without_gil(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        return self._vocabulary.detokenizer(skip_special_tokens)


def _within(encoding: tokenizers.Encoding, cut: int | None) -> list[int]:
    """The first ids, and behind them what the tokenizer closes every text with."""
    ids: list[int] = encoding.ids
    if cut is None or len(ids) <= cut:
        return ids
    closing = 0
    for is_special in reversed(encoding.special_tokens_mask):
        if not is_special or closing == cut:
            break
        closing += 1
    return ids[: cut - closing] + ids[len(ids) - closing :]


def from_directory(path: Path) -> Tokenizer:
    """From tokenizer.json, tokenizer_config.json and, where it is, chat_template.jinja.

    Raises TokenizerError, and ValueError for a file that is no JSON object.
    """
    files = {name: (path / name).read_bytes() for name in BUNDLE_FILES if (path / name).is_file()}
    if "tokenizer.json" not in files:
        raise TokenizerError(f"{path} has no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"{path / 'tokenizer.json'} cannot be read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = parse_object("tokenizer_config.json", files.get("tokenizer_config.json", b"{}"))
    return Tokenizer(backend, _template(_directory_template(files, config), _special_names(config)), files)


def from_gguf(metadata: dict[str, Any], config: dict[str, Any]) -> Tokenizer:
    """`config` is the model's, in Hugging Face's words, for the routers that ask for it.

    Raises TokenizerError, and ValueError for a field of the wrong kind.
    """
    try:
        backend = gguf_tokenizer.build(metadata)
    except gguf_tokenizer.UnsupportedTokenizerError as error:
        raise TokenizerError(str(error)) from error
    except KeyError as error:
        raise TokenizerError(f"the GGUF file's metadata has no {error.args[0]!r}") from error
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"the GGUF file's tokenizer cannot be rebuilt: {_one_line(error)}") from error
    tokens = metadata["tokenizer.ggml.tokens"]
    special: dict[str, str] = {}
    for short, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        for i in token_ids(metadata, METADATA, f"tokenizer.ggml.{name}_token_id", len(tokens)):
            special[f"{short}_token"] = tokens[i]
    source = optional(metadata, METADATA, "tokenizer.chat_template", str)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
        **({"chat_template": source} if source else {}),
    }
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(tokenizer_config, ensure_ascii=False).encode(),
        "config.json": json.dumps(config).encode(),
    }
    return Tokenizer(backend, _template(source, special), files)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A token a byte, ids above 255 nameless: what a fake backend of any vocabulary can be served with."""
    characters = {byte: character for character, byte in detokenizer.byte_characters().items()}
    vocab = {characters[i] if i < 256 else f"<|{i}|>": i for i in range(max(vocab_size, 256))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    source = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    return Tokenizer(backend, ChatTemplate(source, {}), {"tokenizer.json": backend.to_str().encode()})


def _vocabulary(backend: tokenizers.Tokenizer, tokens: Sequence[str | None], special: frozenset[int]) -> Vocabulary:
    # `to_str` of a large vocabulary takes long: the decoder's own state is the same JSON.
    state = backend.decoder.__getstate__() if backend.decoder else None
    try:
        return detokenizer.vocabulary(json.loads(state) if state else None, tokens, special)
    except detokenizer.UnknownDecoderError as error:
        raise TokenizerError(str(error)) from error


def _template(source: str | None, special_tokens: dict[str, str]) -> ChatTemplate | None:
    if not source:
        return None
    try:
        return ChatTemplate(source, special_tokens)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template cannot be parsed: {error}") from error


def _directory_template(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    name = "chat_template.json" if "chat_template.json" in files else "tokenizer_config.json"
    template = parse_object(name, files[name]) if name in files else config
    match template.get("chat_template"):
        case None:
            return None
        case str(source):
            return source
        case list(named):  # several templates by name
            for i, entry in enumerate(named):
                match entry:
                    case {"name": "default", "template": str(source)}:
                        return source
                    case {"name": str(), "template": str()}:
                        pass
                    case _:
                        raise TokenizerError(f"{name}: chat_template[{i}] is {reprlib.repr(entry)}; {NAMED_TEMPLATE}")
            return None
        case other:
            raise TokenizerError(f"{name}: chat_template is {reprlib.repr(other)}; must be a string or a list")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _special_names(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, each written as a string or as an added token."""
    names: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        match config.get(name):
            case str(text) | {"content": str(text)}:
                names[name] = text
    return names
