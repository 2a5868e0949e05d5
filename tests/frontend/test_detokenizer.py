"""A stream's text: whole characters only, and together exactly what `tokenizers` decodes."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from scheduler_svc.frontend.detokenizer import REPLACEMENT, UnknownDecoderError, vocabulary
from scheduler_svc.frontend.model import ServedModel
from scheduler_svc.frontend.tokenizer import Tokenizer

SAMPLES = [
    "Plain English, with “quotes” — and dashes.",
    "日本語のテキスト、한국어, 中文字符，العربية",
    "Emoji 🎉👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇩🇪",
    "tabs\tand\r\nnewlines\n\n\n   spaces   ",
    "1234567890 3.14159 0x1F",
    "naïve café Ångström ﬁ e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\x00\x01\x7f\u0085\ufffd",
]


def stream(tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    return [*(detokenizer.feed([token_id]) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("text", SAMPLES)
def test_real_tokenizer_streams_text_back(real_model: ServedModel, text: str) -> None:
    tokenizer = real_model.tokenizer
    token_ids = tokenizer.encode(text)
    for skip in (True, False):
        pieces = stream(tokenizer, token_ids, skip)
        assert "".join(pieces) == tokenizer.decode(token_ids, skip)
        if REPLACEMENT not in text:
            assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(stream(tokenizer, token_ids, False)) == text


@given(st.lists(st.integers(0, 49_151), max_size=40), st.booleans())
@example([241, 115, 40993, 15107, 232, 227, 2], True)
def test_any_ids_stream_as_they_decode(real_model: ServedModel, token_ids: list[int], skip: bool) -> None:
    assert "".join(stream(real_model.tokenizer, token_ids, skip)) == real_model.tokenizer.decode(token_ids, skip)


@given(st.data(), st.booleans())
def test_broken_utf8_streams_as_it_decodes(real_model: ServedModel, data: st.DataObject, skip: bool) -> None:
    """Single-byte tokens in any order: every kind of broken sequence."""
    singles = [token_id for token_id in range(17, 300) if len(real_model.tokenizer.decode([token_id])) <= 1]
    token_ids = data.draw(st.lists(st.sampled_from(singles), max_size=30))
    assert "".join(stream(real_model.tokenizer, token_ids, skip)) == real_model.tokenizer.decode(token_ids, skip)


def test_half_a_character_is_held(real_model: ServedModel) -> None:
    token_ids = real_model.tokenizer.encode("a🎉b")
    pieces = stream(real_model.tokenizer, token_ids, True)
    assert [piece for piece in pieces if piece] == ["a", "🎉", "b"]
    assert "".join(stream(real_model.tokenizer, token_ids[:2], True)) == "a" + REPLACEMENT


# ---------------------------------------------------------------- SentencePiece style

VOCAB = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "lo", "▁▁", "é", "<0xZZ>"]
DECODERS = {
    "llama": tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    ),
    "gemma": tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    ),
}


def sentencepiece(decoder: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: i for i, token in enumerate(VOCAB)}, merges=[], byte_fallback=True)
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = DECODERS[decoder]
    return Tokenizer(backend, None, {})


@pytest.fixture(scope="module", params=sorted(DECODERS))
def fallback_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return sentencepiece(request.param)


@given(st.lists(st.integers(0, len(VOCAB) - 1), max_size=30), st.booleans())
@example([1, 259, 260, 3 + 0xF0, 3 + 0x9F, 3 + 0x8E, 3 + 0x89, 261], True)
@example([3 + 0xC3, 260, 3 + 0x28, 3 + 0xC3, 2], False)
def test_byte_fallback_streams_as_it_decodes(fallback_tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> None:
    assert "".join(stream(fallback_tokenizer, token_ids, skip)) == fallback_tokenizer.decode(token_ids, skip)


def test_an_unknown_decoder_is_refused_by_name() -> None:
    with pytest.raises(UnknownDecoderError, match="WordPiece"):
        vocabulary({"type": "WordPiece", "prefix": "##", "cleanup": True}, ["a"], frozenset())
