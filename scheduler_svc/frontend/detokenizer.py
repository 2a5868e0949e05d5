"""Token ids → text, piece by piece, for streams: never half a character, and the whole is `Tokenizer.decode`.

What is written is a pure function of the ids seen so far, whatever the batches that they came in. A token costs its
bytes, however long the stream is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Final, Protocol

REPLACEMENT: Final = "\ufffd"


class Detokenizer(Protocol):
    def feed(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""

    def finish(self) -> str:
        """What was held, now that no more tokens come: an unfinished character reads as U+FFFD."""


class Vocabulary(Protocol):
    """Makes detokenizers for one tokenizer."""

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer: ...


# ---------------------------------------------------------------- byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM)


def byte_characters() -> dict[str, int]:
    """GPT-2's character for each byte, backwards: bytes that print stand for themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


class ByteLevelVocabulary:
    """Every token is bytes; the text is their UTF-8."""

    def __init__(self, tokens: Sequence[str | None], special: frozenset[int]) -> None:
        table = byte_characters()
        self._pieces = [_byte_level_piece(token, table) for token in tokens]
        self._shown = [b"" if i in special else piece for i, piece in enumerate(self._pieces)]

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        return _ByteLevelDetokenizer(self._shown if skip_special_tokens else self._pieces)


def _byte_level_piece(token: str | None, table: dict[str, int]) -> bytes:
    """A token with any character outside the table, such as an added token with a space, is written as it stands."""
    if token is None:
        return b""
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode()


class _ByteLevelDetokenizer:
    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces, count = self._pieces, len(self._pieces)
        return self._utf8.decode(b"".join([pieces[i] for i in token_ids if i < count]))

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


# ---------------------------------------------------------------- SentencePiece-style BPE (Llama 2, Mistral, Gemma)


class ByteFallbackVocabulary:
    """Tokens are texts with U+2581 for a space, or single bytes `<0x0A>` where the vocabulary lacks a character.

    A run of byte tokens is one unit to `decode`: valid UTF-8 as a whole, or U+FFFD for each byte. So it is held whole.
    """

    def __init__(
        self,
        tokens: Sequence[str | None],
        special: frozenset[int],
        replacements: Sequence[tuple[str, str]],
        byte_fallback: bool,
        strip_first: str,
    ) -> None:
        self._pieces = [_fallback_piece(token, replacements, byte_fallback) for token in tokens]
        self._shown = [None if i in special else piece for i, piece in enumerate(self._pieces)]
        self._strip_first = strip_first

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        return _ByteFallbackDetokenizer(self._shown if skip_special_tokens else self._pieces, self._strip_first)


def _fallback_piece(
    token: str | None, replacements: Sequence[tuple[str, str]], byte_fallback: bool
) -> str | int | None:
    if token is None:
        return None
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return int(token[3:5], 16)
        except ValueError:
            pass
    for old, new in replacements:
        token = token.replace(old, new)
    return token


class _ByteFallbackDetokenizer:
    def __init__(self, pieces: list[str | int | None], strip_first: str) -> None:
        self._pieces, self._strip = pieces, strip_first
        self._run = bytearray()

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self._step(token_id) for token_id in token_ids])

    def _step(self, token_id: int) -> str:
        match self._pieces[token_id] if token_id < len(self._pieces) else None:
            case None:
                return ""
            case int(byte):
                self._run.append(byte)
                return ""
            case str(text):
                return self._stripped(self._end_run() + text)

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            text, self._strip = text.removeprefix(self._strip), ""
        return text


# ---------------------------------------------------------------- which one a tokenizer.json asks for


class UnknownDecoderError(ValueError):
    """A decoder that this file cannot stream."""


def vocabulary(decoder: dict[str, Any] | None, tokens: Sequence[str | None], special: frozenset[int]) -> Vocabulary:
    """For the `decoder` of a tokenizer.json. Raises UnknownDecoderError, which names it."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    if [step and step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelVocabulary(tokens, special)
    replacements: list[tuple[str, str]] = []
    byte_fallback, strip_first = False, ""
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": str(text), "start": 1, "stop": 0}:
                strip_first = text
            case _:
                raise UnknownDecoderError(f"the tokenizer's decoder {step!r} is not supported")
    return ByteFallbackVocabulary(tokens, special, replacements, byte_fallback, strip_first)
