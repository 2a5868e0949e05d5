"""A `tokenizers` tokenizer from the metadata of a GGUF file: byte-level BPE with the pre-tokenizer that the file names.

Names and meanings: github.com/ggml-org/ggml `docs/gguf.md`, llama.cpp `src/llama-vocab.cpp`. GGUF has only a name for
the pre-tokenizer, so each name that is served has its rule here and any other is refused.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer


class TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class UnsupportedTokenizerError(ValueError):
    """A GGUF tokenizer that cannot be rebuilt, by its name."""


LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2: Final = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def build(metadata: dict[str, Any]) -> Tokenizer:
    """Raises UnsupportedTokenizerError, naming what the file asks for, and KeyError for a missing key."""
    if (kind := metadata["tokenizer.ggml.model"]) != "gpt2":
        raise UnsupportedTokenizerError(
            f"tokenizer.ggml.model = {kind!r} is not supported, only 'gpt2' (byte-level BPE): use the safetensors"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tokens, metadata["tokenizer.ggml.token_type"])
    _add_ends(tokenizer, tokens, metadata, pre)
    return tokenizer


def _pre_tokenizer(name: str) -> PreTokenizer:
    match name:
        case "smollm":
            return pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        case "gpt-2" | "gpt2" | "default":
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "llama-bpe" | "llama3":
            return _split(LLAMA3)
        case "qwen2":
            return _split(QWEN2)
        case _:
            raise UnsupportedTokenizerError(
                f"tokenizer.ggml.pre = {name!r} is not supported (smollm, gpt-2, llama-bpe, qwen2): use the safetensors"
            )


def _split(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    added = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])


def _add_ends(tokenizer: Tokenizer, tokens: list[str], metadata: dict[str, Any], pre: str) -> None:
    """The beginning and the end that the model wants around a text."""
    template, used = "$A", []
    if metadata.get("tokenizer.ggml.add_bos_token", pre in ("llama-bpe", "llama3")):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        template, used = f"{tokens[bos]}:0 $A:0", [(tokens[bos], bos)]
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        eos = metadata["tokenizer.ggml.eos_token_id"]
        template, used = f"{template} {tokens[eos]}:0", [*used, (tokens[eos], eos)]
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
