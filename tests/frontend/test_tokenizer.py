"""Tokenizers from GGUF and from directories, against transformers; chat templates; model cards."""

from __future__ import annotations

import asyncio
import json
import struct
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st

from protos import gguf_header
from scheduler_svc.frontend import gguf_tokenizer
from scheduler_svc.frontend.chat_template import ChatTemplate, TemplateRefusedError
from scheduler_svc.frontend.detokenizer import byte_characters
from scheduler_svc.frontend.model import ModelError, ServedModel, load_model
from scheduler_svc.frontend.tokenizer import byte_tokenizer, from_gguf

TEXTS = [
    "Hello, world!",
    "  leading and trailing  ",
    "1234567890 in 2024: 3.14159e-10",
    "tabs\tand\nnewlines\r\n\r\n   mixed \t\n x",
    "don't can't we'll I'M THEY'RE",
    "日本語のテキスト、한국어, 中文字符，العربية हिन्दी",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 ﬁ naïve",
    "def f(x):\n    return x**2  # comment\n",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|><repo_name>x",
    "\u00a0\u2003\u200b\ufeff\x00\x7f",
    "a" * 300 + " " * 300,
    "٣٤٥ ²³ Ⅷ ½ 一二三",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n\nthere "}],
    [
        {"role": "user", "content": "<b>&amp; {{ 7 * 7 }} {% if %}"},
        {"role": "assistant", "content": "日本 🎉"},
        {"role": "user", "content": ""},
    ],
]


def reference(metadata: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """transformers' own class around the vocabulary, with the pre-tokenizer that SmolLM2's tokenizer.json has."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(tokens[:17])
    return transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=tokens[1],
        eos_token=tokens[2],
        chat_template=metadata["tokenizer.chat_template"],
    )


@pytest.fixture(scope="module")
def theirs(model_path: Path) -> transformers.PreTrainedTokenizerFast:
    return reference(gguf_header.read(model_path).metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_encodes_as_transformers(
    real_model: ServedModel, theirs: transformers.PreTrainedTokenizerFast, text: str
) -> None:
    ids = real_model.tokenizer.encode(text)
    assert ids == theirs.encode(text)
    assert real_model.tokenizer.decode(ids, False) == text


def test_digits_stand_alone(real_model: ServedModel) -> None:
    assert len(real_model.tokenizer.encode("1234567890")) == 10


@pytest.fixture(scope="session")
def missing(real_model: ServedModel) -> set[int]:
    """Bytes without a token: the model's own vocabulary lacks some that UTF-8 rarely or never uses."""
    vocabulary = json.loads(real_model.tokenizer.files["tokenizer.json"])["model"]["vocab"]
    return {byte for character, byte in byte_characters().items() if character not in vocabulary}


@given(st.text(max_size=50))
def test_any_text_survives(real_model: ServedModel, missing: set[int], text: str) -> None:
    """Any whose bytes the vocabulary has."""
    assert len(missing) == 21
    assume(not missing.intersection(text.encode()))
    assert real_model.tokenizer.decode(real_model.tokenizer.encode(text), False) == text


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_render_as_transformers(
    real_model: ServedModel, theirs: transformers.PreTrainedTokenizerFast, chat: list[dict[str, str]], prompt: bool
) -> None:
    assert real_model.tokenizer.chat_template is not None
    rendered = real_model.tokenizer.chat_template.render(chat, prompt)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert real_model.tokenizer.encode(rendered, False) == theirs.encode(rendered, add_special_tokens=False)


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[U]{{ m.content | trim }}\n  {% endif %}\n"
    "{% endfor %}",
    "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% if loop.last %}{% break %}{% endif %}"
    "{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ eos_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ tools is none }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
def test_templates_mean_what_transformers_says(
    theirs: transformers.PreTrainedTokenizerFast, source: str, chat: list[dict[str, str]]
) -> None:
    template = ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    expected = theirs.apply_chat_template(chat, chat_template=source, tokenize=False, add_generation_prompt=True)
    assert template.render(chat, True) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[9].content }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{% macro deeper() %}{{ deeper() }}{% endmacro %}{{ deeper() }}",
        "{{ messages + 1 }}",
    ],
)
def test_a_template_that_fails_is_refused(source: str) -> None:
    with pytest.raises(TemplateRefusedError):
        ChatTemplate(source, {}).render(CHATS[0], True)


def test_the_date_is_brought_to_the_template() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, lambda: datetime(2024, 7, 4))
    assert template.render(CHATS[0], True) == "04 Jul 2024"


# ---------------------------------------------------------------- other GGUF tokenizers


def metadata(**changes: Any) -> dict[str, Any]:
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*characters, "<bos>", "<eos>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def test_begin_and_end_tokens_as_the_file_says() -> None:
    assert len(gguf_tokenizer.build(metadata()).encode("ab").ids) == 2
    both = gguf_tokenizer.build(metadata(add_bos_token=True, add_eos_token=True))
    assert both.encode("ab").ids[::3] == [256, 257]
    assert len(both.encode("ab", add_special_tokens=False).ids) == 2
    assert gguf_tokenizer.build(metadata(pre="llama-bpe")).encode("ab").ids[0] == 256


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 12345 ok", ["it", "'s", "Ġ12345", "Ġok"]),
        ("smollm", "it's 12 ok", ["it", "'s", "Ġ", "1", "2", "Ġok"]),
        ("llama-bpe", "IT'S 12345\n\n ok", ["IT", "'S", "Ġ", "123", "45", "ĊĊ", "Ġok"]),
        ("qwen2", "it's 123\n\n ok", ["it", "'s", "Ġ", "1", "2", "3", "ĊĊ", "Ġok"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, pieces: list[str]) -> None:
    pre_tokenizer = gguf_tokenizer.build(metadata(pre=pre)).pre_tokenizer
    assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(("change", "named"), [({"model": "llama"}, "'llama'"), ({"pre": "tekken"}, "'tekken'")])
def test_what_is_not_supported_is_refused_by_name(change: dict[str, str], named: str) -> None:
    with pytest.raises(gguf_tokenizer.UnsupportedTokenizerError, match=named):
        gguf_tokenizer.build(metadata(**change))


async def turns_beside(task: asyncio.Future[Any]) -> int:
    """How often the loop came round while `task` ran: a thread that holds the GIL lets it a time or two."""
    turns = 0
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    return turns


async def test_long_texts_stall_nobody(real_model: ServedModel) -> None:
    text, tokenizer = "many words " * 50_000, real_model.tokenizer
    encoding = asyncio.ensure_future(tokenizer.encode_off_loop(text))
    assert await turns_beside(encoding) > 10
    assert encoding.result() == tokenizer.encode(text)


async def test_many_ids_stall_nobody(real_model: ServedModel) -> None:
    ids, tokenizer = list(range(17, 10_017)) * 60, real_model.tokenizer
    decoding = asyncio.ensure_future(tokenizer.decode_off_loop(ids))
    assert await turns_beside(decoding) > 10
    assert decoding.result() == tokenizer.decode(ids)


async def test_off_the_loop_the_result_is_the_same() -> None:
    """Special tokens and ends, for a text that goes to a thread."""
    model = from_gguf(metadata(add_bos_token=True, add_eos_token=True), {})
    for add in (True, False):
        ids = await model.encode_off_loop("x<eos>" * 1000, add)
        assert ids == model.encode("x<eos>" * 1000, add)
        assert len(ids) == 2000 + 2 * add
        for skip in (True, False):
            assert await model.decode_off_loop(ids * 2, skip) == model.decode(ids * 2, skip)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merges": ["a zz"]}, "`zz` out of vocabulary"),
        ({"merges": [5]}, "tokenizer cannot be rebuilt"),
        ({"merges": ["ab"]}, "tokenizer cannot be rebuilt"),
        ({"tokens": [1, 2]}, "tokenizer cannot be rebuilt"),
        ({"tokens": []}, "tokenizer cannot be rebuilt"),
        ({"token_type": [1]}, "tokenizer cannot be rebuilt"),
        ({"bos_token_id": 9999, "add_bos_token": True}, "tokenizer cannot be rebuilt"),
        ({"bos_token_id": 9999}, r"tokenizer\.ggml\.bos_token_id is 9999; must be in \[0, 257\]"),
        ({"padding_token_id": "x"}, r"tokenizer\.ggml\.padding_token_id is 'x'; must be in \[0, 257\]"),
    ],
)
def test_a_damaged_vocabulary_is_one_clear_line(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        from_gguf(metadata(**change), {})
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- model directories


def write_directory(path: Path, **files: Any) -> Path:
    defaults: dict[str, Any] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 300,
            "max_position_embeddings": 128,
            "eos_token_id": 7,
        },
        "tokenizer.json": json.loads(byte_tokenizer(256).files["tokenizer.json"]),
    }
    for name, content in {**defaults, **{key.replace("__", "."): value for key, value in files.items()}}.items():
        if content is not None:
            (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_directory_and_its_generation_config(tmp_path: Path) -> None:
    generation = {"eos_token_id": [5, 6], "temperature": 0.5, "top_k": 9, "max_new_tokens": 33, "do_sample": False}
    tokenizer_config = {"chat_template": "{{ bos_token }}", "bos_token": {"content": "<s>", "special": True}}
    model = load_model(
        write_directory(tmp_path, generation_config__json=generation, tokenizer_config__json=tokenizer_config)
    )
    assert model.card.eos_token_ids == (5, 6)
    assert (model.card.architecture, model.card.vocab_size, model.card.max_model_len) == ("LlamaForCausalLM", 300, 128)
    assert model.card.defaults.given() == {"temperature": 0.5, "top_k": 9, "max_new_tokens": 33}
    assert model.tokenizer.chat_template is not None
    assert model.tokenizer.chat_template.render(CHATS[0], True) == "<s>"


def test_a_directory_without_generation_config(tmp_path: Path) -> None:
    model = load_model(
        write_directory(tmp_path, chat_template__jinja="J", tokenizer_config__json={"chat_template": "C"})
    )
    assert model.card.eos_token_ids == (7,)
    assert model.card.defaults.given() == {}
    assert model.tokenizer.chat_template is not None
    assert model.tokenizer.chat_template.source == "J", "the file goes before the config"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer__json": None}, "no tokenizer.json"),
        ({"tokenizer__json": "{"}, "tokenizer.json cannot be read"),
        ({"config__json": {"vocab_size": 3}}, "max_position_embeddings"),
        ({"config__json": "[1"}, "Expecting"),
        ({"config__json": []}, r"config\.json is \[\]; must be an object"),
        ({"config__json": "[" * 100_000}, r"config\.json is not JSON"),
        *[
            (
                {"config__json": {"vocab_size": 300, "max_position_embeddings": 128, key: value}},
                rf"config\.json: {words}",
            )
            for key, value, words in (
                ("architectures", 5, "architectures is 5; must be a list"),
                ("architectures", [5], r"architectures\[0\] is 5; must be a string"),
                ("model_type", [], r"model_type is \[\]; must be a string"),
                ("text_config", 5, "text_config is 5; must be an object"),
                ("quantization_config", 5, "quantization_config is 5; must be an object"),
                (
                    "quantization_config",
                    {"quant_method": 5},
                    "quantization_config: quant_method is 5; must be a string",
                ),
                ("vocab_size", "x", "vocab_size is 'x'; must be a whole number"),
                ("vocab_size", 0, "vocab_size is 0; must be at least 1"),
                ("eos_token_id", 300, r"eos_token_id is 300; must be in \[0, 299\], whole"),
            )
        ],
        ({"generation_config__json": []}, r"generation_config\.json is \[\]; must be an object"),
        *[
            (
                {"generation_config__json": {"eos_token_id": value}},
                r"generation_config\.json: eos_token_id is .*; must be in \[0, 299\], whole",
            )
            for value in json.loads('["x", -1, 300, 99999, 1.5, true, {}, [1, "x"], [1, 300]]')
        ],
        ({"tokenizer_config__json": []}, r"tokenizer_config\.json is \[\]; must be an object"),
        (
            {"tokenizer_config__json": {"chat_template": [5]}},
            r"tokenizer_config\.json: chat_template\[0\] is 5; must be",
        ),
        ({"tokenizer_config__json": {"chat_template": 5}}, r"tokenizer_config\.json: chat_template is 5; must be"),
        ({"chat_template__json": []}, r"chat_template\.json is \[\]; must be an object"),
        ({"chat_template__jinja": "{% for %}"}, "chat template cannot be parsed"),
        *[
            ({"generation_config__json": {name: value}}, rf"generation_config\.json: {name} is .*; must be in {limits}")
            for name, value, limits in (
                ("repetition_penalty", 1e-38, r"\[0\.01, 100\]"),
                ("temperature", -1, r"\[0, 100\]"),
                ("temperature", "hot", r"\[0, 100\]"),
                ("temperature", float("nan"), r"\[0, 100\]"),
                ("top_p", 0, r"\(0, 1\]"),
                ("min_p", "0.1", r"\[0, 1\]"),
                ("top_k", 2.5, r"\[-1, 4294967295\], whole"),
                ("max_new_tokens", 0, r"\[1, 4294967295\], whole"),
            )
        ],
    ],
)
def test_a_broken_directory_is_one_clear_line(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        load_model(write_directory(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_null_is_as_good_as_unset(tmp_path: Path) -> None:
    nulls = dict.fromkeys(["architectures", "model_type", "text_config", "quantization_config", "eos_token_id"])
    config = {"vocab_size": 300, "max_position_embeddings": 128, "pad_token_id": -1, **nulls}
    card = load_model(write_directory(tmp_path, config__json=config)).card
    assert (card.architecture, card.model_type, card.quantization) == ("", "", "")
    assert (card.vocab_size, card.eos_token_ids, card.pad_token_id) == (300, (), None)


def test_the_default_of_several_templates(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    model = load_model(write_directory(tmp_path, tokenizer_config__json={"chat_template": named}))
    assert model.tokenizer.chat_template is not None
    assert model.tokenizer.chat_template.source == "D"


def test_what_is_no_model_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        load_model(tmp_path / "nothing")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(ModelError, match=r"general\.architecture"):
        load_model(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="fake"):
        load_model("fake:vocab=many")


def test_the_real_card(real_model: ServedModel) -> None:
    card = real_model.card
    assert (card.vocab_size, card.max_model_len, card.eos_token_ids) == (49152, 8192, (2,))
    assert (card.bos_token_id, card.pad_token_id, card.quantization) == (1, 2, "Q4_1")
