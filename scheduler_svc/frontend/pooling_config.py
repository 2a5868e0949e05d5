"""How a checkpoint's vectors are made of its states, as sentence-transformers and GGUF write it beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from scheduler_svc.frontend.config_fields import METADATA, optional, parse_object

MODULES: Final = "modules.json"
_MODES: Final = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last", "cls": "cls", "mean": "mean"}
_GGUF_TYPES: Final = {0: "last", 1: "mean", 2: "cls", 3: "last"}  # llama.cpp's enum llama_pooling_type; 0 is none
_SERVED_MODULES: Final = ("Transformer", "Pooling", "Normalize")


class PoolingDefault(NamedTuple):
    kind: str = "last"  # last | mean | cls
    trouble: str = ""  # why the model's own cannot be served; a request may name another


def of_directory(path: Path) -> PoolingDefault:
    """Raises ValueError for files that are not of that layout."""
    if not (path / MODULES).is_file():
        return PoolingDefault()
    modules = json.loads((path / MODULES).read_bytes())
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{MODULES} is no list of modules")
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules}
    if others := [kind for kind in kinds if kind not in _SERVED_MODULES]:
        return PoolingDefault(trouble=f"{MODULES} has the module {others[0]}, which is not served")
    if "Pooling" not in kinds:
        return PoolingDefault()
    name = f"{optional(kinds['Pooling'], MODULES, 'path', str) or '1_Pooling'}/config.json"
    return _of_module(name, parse_object(name, (path / name).read_bytes()))


def _of_module(name: str, config: dict[str, Any]) -> PoolingDefault:
    if given := optional(config, name, "pooling_mode", str):
        modes = [given]
    else:
        modes = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
        modes = [mode for mode in modes if f"pooling_mode_{mode}" in config]
    if len(modes) == 1 and modes[0] in _MODES:
        return PoolingDefault(_MODES[modes[0]])
    return PoolingDefault(trouble=f"{name} asks for {' and '.join(modes) or 'no pooling'}, which is not served")


def of_gguf(metadata: dict[str, Any], architecture: str) -> PoolingDefault:
    key = f"{architecture}.pooling_type"
    number = optional(metadata, METADATA, key, int) or 0
    if number in _GGUF_TYPES:
        return PoolingDefault(_GGUF_TYPES[number])
    return PoolingDefault(trouble=f"{key} is {number}, which is not served")
