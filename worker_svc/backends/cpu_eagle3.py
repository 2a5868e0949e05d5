"""An EAGLE-3 head on the kernels and the threads of the cpu backend, its products in int8: what it says are guesses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import library
from kernels.cpu.library import PANEL, Floats, Library, LibraryError, Model, Spec, Weight
from worker_svc.backends.base import BackendError
from worker_svc.backends.cpu_draft import CpuDraft
from worker_svc.backends.cpu_model import KVForm, shape, tables
from worker_svc.inputs import Ints, StepInputs
from worker_svc.models.spec import ModelSpec
from worker_svc.speculation.eagle3 import Eagle3Head


class CpuEagle3(CpuDraft):
    """Opened beside a model that keeps the head's taps, see `with_taps`."""

    shift = 1

    def __init__(
        self, library: Library, head: Eagle3Head, name: str, kv: KVForm, max_model_len: int, beside: Model
    ) -> None:
        """Raises BackendError."""
        self.max_model_len = longest = min(max_model_len, head.spec.max_positions)
        self._targets = head.targets
        self._states = np.zeros((0, head.spec.hidden_size), np.float32)  # of the outputs of the last call
        try:
            self._model = library.open_beside(_whole(library, head, kv, longest), beside)
        except LibraryError as error:
            raise BackendError(f"{name}: {error}") from error

    def greedy(self, inputs: StepInputs, before: Ints | None) -> Ints:
        states = None if before is None else self._states[before]
        tokens = self._greedy(inputs, states)
        self._states = self._model.states(inputs.sample_tokens)
        return self._targets[tokens]


def tap_bytes(target: ModelSpec, taps: tuple[int, ...], block_size: int) -> int:
    """Of a block, beside its keys and values."""
    return block_size * len(taps) * target.hidden_size * 2


def with_taps(spec: Spec, taps: tuple[int, ...]) -> Spec:
    spec.num_taps = len(taps)
    return spec.point(taps=np.array(taps, np.int32))


def _whole(library_: Library, head: Eagle3Head, kv: KVForm, longest: int) -> Spec:
    cos, sin = tables(head.spec, longest)[head.spec.rope]
    made = shape(head.spec, kv, longest)
    weights = {name: _packed(library_, rows) for name, rows in head.products.items() if name not in ("gate", "up")}
    gate_up = _packed(library_, _alternating(head.products["gate"], head.products["up"]))
    layer = library.Layer(qkv=weights["qkv"], o=weights["o"], gate_up=gate_up, down=weights["down"])
    layer.point(attn_norm=head.norms["state"], mlp_norm=head.norms["mlp"])
    made.layers, made.lm_head, made.fuse = library.array_of([layer]), weights["lm_head"], weights["fuse"]
    made.point(cos=cos, sin=sin, embed=head.embed, final_norm=head.norms["final"])
    made.point(embed_norm=head.norms["embed"], state_norm=head.norms["state"])
    return made.keep(layer, gate_up, weights)


def _packed(library_: Library, rows: Floats) -> Weight:
    n, k = rows.shape
    data = _aligned(library_.packed_bytes("int8", n, k))
    scale = np.zeros(-(-n // PANEL) * PANEL, np.float32)
    library_.pack_int8(np.ascontiguousarray(rows), data, scale)
    return library.weight("int8", n, k, data, scale)


def _alternating(gate: Floats, up: Floats) -> Floats:
    """A panel of gate, the same panel of up, and so on; zeros where the last ones are not full."""
    more = (0, -len(gate) % PANEL), (0, 0)
    both = [np.pad(rows, more).reshape(-1, PANEL, rows.shape[1]) for rows in (gate, up)]
    return np.stack(both, axis=1).reshape(-1, gate.shape[1])


def _aligned(size: int) -> NDArray[np.uint8]:
    """Zeros at a multiple of 64."""
    room = np.zeros(size + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size]
