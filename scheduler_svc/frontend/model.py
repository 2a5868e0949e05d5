"""What the frontend knows of the model it serves: its card and its tokenizer, read without torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protos import gguf_header
from scheduler_svc.frontend import pooling_config, tokenizer
from scheduler_svc.frontend.config_fields import METADATA, optional, parse_object, positive, token_ids
from scheduler_svc.frontend.limits import DEFAULT_RANGES
from scheduler_svc.frontend.pooling_config import PoolingDefault
from scheduler_svc.frontend.tokenizer import Tokenizer, TokenizerError

FAKE: Final = "fake:"  # `fake:vocab=512,…` names the fake backend of worker_svc/backends
FAKE_VOCAB: Final = 512
FAKE_CONTEXT: Final = 8192
CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"


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
    pooling: PoolingDefault = field(default_factory=PoolingDefault)
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
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    raise ModelError(f"{path} is neither a directory nor a .gguf file")


def _directory_card(path: Path) -> ModelCard:
    config = parse_object(CONFIG, (path / CONFIG).read_bytes())
    text = optional(config, CONFIG, "text_config", dict) or config
    generation_path = path / GENERATION
    generation = parse_object(GENERATION, generation_path.read_bytes()) if generation_path.is_file() else {}
    vocab_size = positive(text, CONFIG, "vocab_size")
    ends, ends_file = (generation, GENERATION) if "eos_token_id" in generation else (text, CONFIG)
    quantization = optional(config, CONFIG, "quantization_config", dict) or {}
    return ModelCard(
        name=path.name,
        path=str(path),
        architecture=_architecture(config),
        model_type=optional(config, CONFIG, "model_type", str) or "",
        vocab_size=vocab_size,
        max_model_len=positive(text, CONFIG, "max_position_embeddings"),
        eos_token_ids=token_ids(ends, ends_file, "eos_token_id", vocab_size),
        bos_token_id=_named_id(generation, text, "bos_token_id"),
        pad_token_id=_named_id(generation, text, "pad_token_id"),
        quantization=optional(quantization, f"{CONFIG}: quantization_config", "quant_method", str) or "",
        pooling=pooling_config.of_directory(path),
        defaults=_defaults(generation),
    )


def _architecture(config: dict[str, Any]) -> str:
    first, *_ = optional(config, CONFIG, "architectures", list) or [""]
    if not isinstance(first, str):
        raise ValueError(f"{CONFIG}: architectures[0] is {first!r}; must be a string")
    return first


def _named_id(generation: dict[str, Any], text: dict[str, Any], key: str) -> int | None:
    """Only told to routers, nothing is sampled by it. None for the −1 that some models write for none."""
    values, file = (generation, GENERATION) if key in generation else (text, CONFIG)
    value = optional(values, file, key, int)
    return value if value is not None and value >= 0 else None


def _defaults(generation: dict[str, Any]) -> Defaults:
    """`do_sample` is not asked for: a client who wants greedy says temperature 0, as with vLLM.

    Raises ValueError for a default that no request could set itself: a worker could not sample by it.
    """
    given = {name: value for name in DEFAULT_RANGES if (value := generation.get(name)) is not None}
    for name, value in given.items():
        if value not in (allowed := DEFAULT_RANGES[name]):
            raise ValueError(f"{GENERATION}: {name} is {value!r}; must be in {allowed}")
    return Defaults(**given)


def _gguf_model(path: Path) -> ServedModel:
    header = gguf_header.read(path)
    metadata = header.metadata
    architecture = optional(metadata, METADATA, "general.architecture", str)
    if not architecture:
        raise ValueError(f"{METADATA} has no 'general.architecture'")
    size_key = f"{architecture}.vocab_size"
    tokens = optional(metadata, METADATA, "tokenizer.ggml.tokens", list) or []
    vocab_size = positive(metadata, METADATA, size_key) if size_key in metadata else len(tokens)
    end_keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    ends = (i for key in end_keys for i in token_ids(metadata, METADATA, key, vocab_size))
    card = ModelCard(
        name=path.stem,
        path=str(path),
        architecture=architecture,
        model_type=architecture,
        vocab_size=vocab_size,
        max_model_len=positive(metadata, METADATA, f"{architecture}.context_length"),
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=optional(metadata, METADATA, "tokenizer.ggml.bos_token_id", int),
        pad_token_id=optional(metadata, METADATA, "tokenizer.ggml.padding_token_id", int),
        quantization=_gguf_quantization(header),
        pooling=pooling_config.of_gguf(metadata, architecture),
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
