"""A checkpoint's file taken apart, changed, and written again: without the code under test."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.formats.builders import safetensors


@dataclass
class Stored:
    """Tensors by name: type, shape, bytes; and the whole config.json."""

    tensors: dict[str, tuple[str, list[int], bytes]]
    config: dict[str, Any]

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        rows = [(name, dtype, shape, data) for name, (dtype, shape, data) in self.tensors.items()]
        (path / "model.safetensors").write_bytes(safetensors(rows))
        (path / "config.json").write_text(json.dumps(self.config))
        return path


def stored(path: Path) -> Stored:
    data = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    tensors = {
        name: (fields["dtype"], fields["shape"], data[8 + length :][slice(*fields["data_offsets"])])
        for name, fields in header.items()
        if name != "__metadata__"
    }
    return Stored(tensors, json.loads((path / "config.json").read_text()))
