"""What the frontend knows of the model it serves: its card and its tokenizer, read without torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protos import gguf_header
from scheduler_svc.frontend import tokenizer
from scheduler_svc.frontend.limits import DEFAULT_RANGES
from scheduler_svc.frontend.tokenizer import Tokenizer, TokenizerError

FAKE: Final = "fake:"  # `fake:vocab=512,…` names the fake backend of worker_svc/backends
FAKE_VOCAB: Final = 512
FAKE_CONTEXT: Final = 8192


class ModelError(ValueError):
    """A model path that cannot be served, in one line for the person who started the service."""


@dataclass(frozen=True)
class Defaults:
    """generation_config.json: what a request that leaves a field unset gets. None: the API's own default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    def given(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ModelCard:
    name: str
    path: str
    architecture: str  # the config's class, or GGUF's name for it
    model_type: str
    vocab_size: int
    max_model_len: int  # tokens that the model was made for
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    quantization: str = ""
    defaults: Defaults = field(default_factory=Defaults)


@dataclass(frozen=True)
class ServedModel:
    card: ModelCard
    tokenizer: Tokenizer


def load_model(path: str | Path) -> ServedModel:
    """From a directory of Hugging Face's layout, a `.gguf` file, or `fake:…`. Raises ModelError."""
    if str(path).startswith(FAKE):
        return _fake(str(path))
    path = Path(path)
    try:
        if path.is_dir():
            return ServedModel(_directory_card(path), tokenizer.from_directory(path))
        if path.suffix == ".gguf":
            return _gguf_model(path)
    except TokenizerError as error:
        raise ModelError(f"{path}: {error}") from error
    except gguf_header.GGUFError as error:
        raise ModelError(str(error)) from error
    except KeyError as error:
        raise ModelError(f"{path}: the model's configuration has no {error.args[0]!r}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    raise ModelError(f"{path} is neither a directory nor a .gguf file")


def _directory_card(path: Path) -> ModelCard:
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config", config)
    generation_path = path / "generation_config.json"
    generation = json.loads(generation_path.read_text()) if generation_path.is_file() else {}
    architectures = config.get("architectures") or [""]
    return ModelCard(
        name=path.name,
        path=str(path),
        architecture=architectures[0],
        model_type=config.get("model_type", ""),
        vocab_size=text["vocab_size"],
        max_model_len=text["max_position_embeddings"],
        eos_token_ids=_ids(generation.get("eos_token_id", text.get("eos_token_id"))),
        bos_token_id=generation.get("bos_token_id", text.get("bos_token_id")),
        pad_token_id=generation.get("pad_token_id", text.get("pad_token_id")),
        quantization=config.get("quantization_config", {}).get("quant_method", ""),
        defaults=_defaults(generation),
    )


def _defaults(generation: dict[str, Any]) -> Defaults:
    """`do_sample` is not asked for: a client who wants greedy says temperature 0, as with vLLM.

    Raises ValueError for a default that no request could set itself: a worker could not sample by it.
    """
    given = {name: value for name in DEFAULT_RANGES if (value := generation.get(name)) is not None}
    for name, value in given.items():
        if value not in (allowed := DEFAULT_RANGES[name]):
            raise ValueError(f"generation_config.json: {name} is {value!r}; must be in {allowed}")
    return Defaults(**given)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    match value:
        case None:
            return ()
        case int(one):
            return (one,)
        case _:
            return tuple(value)


def _gguf_model(path: Path) -> ServedModel:
    header = gguf_header.read(path)
    metadata = header.metadata
    architecture = metadata["general.architecture"]
    end_names = ("eos", "eot", "eom")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in end_names)
    card = ModelCard(
        name=path.stem,
        path=str(path),
        architecture=architecture,
        model_type=architecture,
        vocab_size=metadata.get(f"{architecture}.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
        max_model_len=metadata[f"{architecture}.context_length"],
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        quantization=_gguf_quantization(header),
    )
    config = {
        "model_type": architecture,
        "vocab_size": card.vocab_size,
        "max_position_embeddings": card.max_model_len,
        "bos_token_id": card.bos_token_id,
        "eos_token_id": list(card.eos_token_ids),
        "pad_token_id": card.pad_token_id,
    }
    return ServedModel(card, tokenizer.from_gguf(metadata, config))


def _gguf_quantization(header: gguf_header.GGUFFile) -> str:
    """The type that most of the file's bytes have, such as `Q4_1`."""
    sizes: Counter[int] = Counter()
    for tensor in header.tensors.values():
        sizes[tensor.ggml_type] += tensor.nbytes
    return gguf_header.GGML_TYPES[sizes.most_common(1)[0][0]].name if sizes else ""


def _fake(path: str) -> ServedModel:
    """A byte tokenizer for the fake backend: no end token; `vocab` and `context` are read from the path."""
    pairs = dict(pair.split("=", 1) for pair in path.removeprefix(FAKE).split(",") if "=" in pair)
    try:
        vocab_size = int(pairs.get("vocab", FAKE_VOCAB))
        max_model_len = int(pairs.get("context", FAKE_CONTEXT))
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    card = ModelCard("fake", path, "fake", "fake", vocab_size, max_model_len)
    return ServedModel(card, tokenizer.byte_tokenizer(vocab_size))
