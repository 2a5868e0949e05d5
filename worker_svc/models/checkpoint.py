"""From a path to weights, whatever the format. numpy only."""

from __future__ import annotations

from pathlib import Path

from worker_svc.models.gguf import GGUFCheckpoint
from worker_svc.models.raw_tensor import Checkpoint, CheckpointError, RawTensor
from worker_svc.models.safetensors_reader import SafetensorsCheckpoint

__all__ = ["Checkpoint", "CheckpointError", "RawTensor", "open_checkpoint"]


def open_checkpoint(path: Path) -> GGUFCheckpoint | SafetensorsCheckpoint:
    """A `.gguf` file, a `.safetensors` file, or a directory of safetensors. Reads and checks headers only.

    Raises CheckpointError for anything else and for an unsound file, OSError for one that cannot be opened.
    """
    if path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path)
    raise CheckpointError(f"{path}: neither a directory nor a .gguf or .safetensors file")
