"""Which adapters a worker holds: each at an index of its own, 1 … max_adapters; 0 is none."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter that cannot be served, in one line that names file, tensor or field."""


class Places:
    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self.by_name: dict[str, int] = {}

    def free(self, name: str) -> int:
        """Where `name` may go; it is there once it is in `by_name`. Raises AdapterError where it cannot be taken in."""
        if name in self.by_name:
            raise AdapterError(f"adapter {name!r} is loaded already")
        if len(self.by_name) >= self.max_adapters:
            raise AdapterError(f"max_adapters is {self.max_adapters}, and so many are loaded")
        taken = self.by_name.values()
        return next(index for index in range(1, self.max_adapters + 1) if index not in taken)

    def remove(self, name: str) -> int:
        """Where it was."""
        if name not in self.by_name:
            raise AdapterError(f"adapter {name!r} is not loaded")
        return self.by_name.pop(name)
