"""What an adapter is on disk: a directory as PEFT writes it. Standard library only: scheduler and worker both look."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
MAX_NAME: Final = 128  # characters


class AdapterFilesError(ValueError):
    """One line that names the directory or the file, and what is wrong with it."""


def digest(directory: Path) -> str:
    """BLAKE2b of both files: the same wherever the same adapter lies. Raises AdapterFilesError for one that is none."""
    hasher = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        try:
            if (directory / name).exists() and not (directory / name).is_file():  # a pipe would never end
                raise AdapterFilesError(f"{directory / name}: not a file")
            with (directory / name).open("rb") as file:
                hasher.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        except OSError as error:
            raise AdapterFilesError(f"{directory / name}: {error.strerror or error}") from None
    return hasher.hexdigest()


def check_name(name: str) -> str:
    """What is wrong with it as a name; empty where nothing is."""
    if not name:
        return "is empty"
    if len(name) > MAX_NAME:
        return f"has {len(name)} characters; at most {MAX_NAME}"
    return "" if name.isascii() and name.isprintable() else "must be printable ASCII"
