"""The CPU step from Python: the structs of csrc/abi.h, and its functions on numpy arrays. ctypes and numpy alone.

Arrays are passed as they are, never converted: one that is not contiguous or of another dtype raises TypeError, which
only a mistake in our own code can cause. Whatever the library refuses raises LibraryError with the library's reason.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kernels.cpu import build
from kernels.cpu.build import LibraryError, source_digest
from kernels.cpu.cpus import usable_cpus, usable_threads

__all__ = ["LibraryError", "load", "source_digest", "usable_cpus", "usable_threads"]

ABI: Final = 6
PANEL: Final = 48  # columns
GROUP: Final = 32  # weights
PAGE: Final = 32  # tokens
KV_TILE: Final = 64  # tokens

Kind = Literal["bf16", "int8", "int4", "w8a8", "w4a16", "w8a16"]
KINDS: Final[dict[str, int]] = {"bf16": 0, "int8": 1, "int4": 2, "w8a8": 3, "w4a16": 4, "w8a16": 5}
KV_KINDS: Final = {"bf16": 0, "int8": 1}
ACTIVATIONS: Final = {"silu": 0, "gelu": 1, "gelu_tanh": 2}

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Halves = NDArray[np.uint16]
Bytes = NDArray[np.uint8]

PARAMS: Final = np.dtype(
    [
        ("temperature", np.float32), ("min_p", np.float32), ("repetition", np.float32), ("presence", np.float32),
        ("frequency", np.float32), ("logprobs", np.int32), ("top_k", np.int64), ("top_p", np.float64),
        ("seed", np.uint64), ("position", np.int64),
    ],
    align=True,
)  # fmt: skip


class Struct(ctypes.Structure):
    """A struct whose pointers are set from numpy arrays, which live as long as it does, as do structs it was made of.

    Reading a nested struct gives a view, which keeps nothing.
    """

    _arrays_: ClassVar[dict[str, DTypeLike]] = {}  # what each pointer points to

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.keep(*args, *fields.values())

    def point(self, **arrays: NDArray[Any] | None) -> Self:
        kept = self.__dict__.setdefault("_kept", {})
        for name, array in arrays.items():
            if array is not None and (array.dtype != self._arrays_[name] or not array.flags.c_contiguous):
                raise TypeError(f"{name} is {array.dtype} {array.strides}, not contiguous {self._arrays_[name]}")
            kept[name] = array
            setattr(self, name, None if array is None else address(array))
        return self

    def keep(self, *others: object) -> Self:
        """Keeps alive what nested structs point to."""
        self.__dict__.setdefault("_others", []).extend(others)
        return self


def address(array: NDArray[Any]) -> int:
    where: int = array.ctypes.data  # the array interface is five times as slow for a structured type
    return where


class Weight(Struct):
    _fields_ = (
        ("kind", c_int32), ("n", c_int32), ("k", c_int32),
        ("data", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("group", c_int32), ("order", c_void_p),
    )  # fmt: skip
    _arrays_: ClassVar = {"data": np.uint8, "scale": np.float32, "bias": np.float32, "order": np.int32}


class Layer(Struct):
    _fields_ = (
        ("qkv", Weight), ("o", Weight), ("gate_up", Weight), ("down", Weight),
        ("attn_norm", c_void_p), ("mlp_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        ("window", c_int32), ("attn_post_norm", c_void_p), ("mlp_post_norm", c_void_p),
        ("cos", c_void_p), ("sin", c_void_p),
    )  # fmt: skip
    _arrays_: ClassVar = dict.fromkeys(
        ("attn_norm", "mlp_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_post_norm", "cos", "sin"), np.float32
    )


class Spec(Struct):
    _fields_ = (
        ("abi", c_int32), ("vocab_size", c_int32), ("hidden_size", c_int32), ("intermediate_size", c_int32),
        ("num_layers", c_int32), ("num_heads", c_int32), ("num_kv_heads", c_int32), ("head_dim", c_int32),
        ("rotary_dim", c_int32), ("max_model_len", c_int32), ("activation", c_int32),
        ("kv_kind", c_int32), ("block_size", c_int32), ("num_blocks", c_int32),
        ("norm_eps", c_float), ("attention_scale", c_float), ("attention_softcap", c_float),
        ("logit_softcap", c_float), ("embedding_scale", c_float),
        ("cos", c_void_p), ("sin", c_void_p), ("embed", c_void_p), ("final_norm", c_void_p),
        ("lm_head", Weight), ("layers", POINTER(Layer)),
        ("taps", c_void_p), ("num_taps", c_int32),
        ("fuse", Weight), ("embed_norm", c_void_p), ("state_norm", c_void_p),
    )  # fmt: skip
    _arrays_: ClassVar = {
        **dict.fromkeys(("cos", "sin", "final_norm", "embed_norm", "state_norm"), np.float32),
        "embed": np.uint16, "taps": np.int32,
    }  # fmt: skip


class Batch(Struct):
    _fields_ = (
        ("num_rows", c_int32), ("num_tokens", c_int32),
        ("cu", c_void_p), ("context_lens", c_void_p),
        ("token_ids", c_void_p), ("positions", c_void_p), ("slot_mapping", c_void_p),
        ("block_tables", c_void_p), ("table_stride", c_int64), ("adapters", c_void_p),
        ("wanted", c_void_p), ("num_wanted", c_int64), ("states", c_void_p),
    )  # fmt: skip
    _arrays_: ClassVar = {
        **dict.fromkeys(("cu", "context_lens", "token_ids", "positions", "slot_mapping"), np.int64),
        **dict.fromkeys(("block_tables", "wanted"), np.int64),
        "adapters": np.int32,
        "states": np.float32,
    }


LORAS: Final = ("q", "k", "v", "o", "gate", "up", "down")  # of a layer, in this order
MAX_ADAPTERS: Final = 1024
LORA_RANKS: Final = 16  # a rank is a multiple


class Lora(Struct):
    _fields_ = (("a", c_void_p), ("b", c_void_p), ("scale", c_float), ("rank", c_int32))
    _arrays_: ClassVar = dict.fromkeys("ab", np.uint16)


class Samples(Struct):
    _fields_ = (
        ("num", c_int32), ("tokens", c_void_p), ("params", c_void_p),
        ("num_bias", c_int64), ("num_bans", c_int64), ("num_penalties", c_int64),
        ("bias_at", c_void_p), ("bias", c_void_p), ("ban_at", c_void_p),
        ("penalty_at", c_void_p), ("penalty_counts", c_void_p),
        ("mask_rows", c_void_p), ("bitmask", c_void_p), ("max_top", c_int32),
        ("token_ids", c_void_p), ("logprobs", c_void_p), ("ranks", c_void_p),
        ("top_ids", c_void_p), ("top_logprobs", c_void_p),
    )  # fmt: skip
    _arrays_: ClassVar = {
        **dict.fromkeys(("tokens", "bias_at", "ban_at", "penalty_at", "penalty_counts"), np.int64),
        **dict.fromkeys(("token_ids", "ranks", "top_ids"), np.int64),
        "params": PARAMS, "bias": np.float32, "mask_rows": np.int32, "bitmask": np.uint32,
        "logprobs": np.float64, "top_logprobs": np.float64,
    }  # fmt: skip


def weight(
    kind: str,
    n: int,
    k: int,
    data: Bytes,
    scale: Floats | None = None,
    bias: Floats | None = None,
    group: int = 0,
    order: NDArray[np.int32] | None = None,
) -> Weight:
    """`data` packed, 64-byte aligned; `scale` and `bias` [n rounded up to PANEL]; `order` [k] of x's columns."""
    return Weight(KINDS[kind], n, k, group=group).point(data=data, scale=scale, bias=bias, order=order)


def array_of(each: Sequence[Layer] | Sequence[Lora]) -> Any:
    """What Spec.layers or `set_adapter` points to; not empty."""
    kind: Any = type(each[0])
    array: Any = (kind * len(each))(*each)
    array.kept = each  # the elements are copies, which keep nothing
    return array


@functools.cache
def load() -> Library:
    """The library, compiled on first use. Raises LibraryError."""
    return Library(build.library())


class Library:
    """One shared object. `path` is from kernels.cpu.build."""

    def __init__(self, path: Path) -> None:
        try:
            self.c = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(f"the CPU kernels do not load: {error}") from error
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        if self.c.pw_abi() != ABI:
            raise LibraryError(f"the CPU kernels at {path} are ABI {self.c.pw_abi()}, not {ABI}")

    @property
    def isas(self) -> list[str]:
        """Instruction sets that this host can run, best first."""
        names: bytes = self.c.pw_isas()
        return names.decode().split()

    def kv_block_bytes(self, spec: Spec) -> int:
        """Of one block, all layers."""
        return self._size(self.c.pw_kv_block_bytes(byref(spec)))

    def packed_bytes(self, kind: str, n: int, k: int, group: int = 0) -> int:
        """`group`: of w4a16 and w8a16, columns that share a scale."""
        return self._size(self.c.pw_packed_bytes(KINDS[kind], n, k, group))

    def pack_bf16(self, w: Halves, out: Bytes) -> None:
        """`w` [n, k] bfloat16 bits; `out` [packed_bytes]. This and the others: safe on several threads at once."""
        self.check(self.c.pw_pack_bf16(_in(w, np.uint16), *w.shape, _in(out, np.uint8)))

    def pack_int8(self, w: Floats, out: Bytes, scale: Floats) -> None:
        """`w` [n, k]; chooses the codes and `scale` [n rounded up to PANEL]."""
        self.check(self.c.pw_pack_int8(_in(w, np.float32), *w.shape, _in(out, np.uint8), _in(scale, np.float32)))

    def pack_int4(self, codes: Bytes, d: Halves, m: Halves, out: Bytes) -> None:
        """`codes` 0…15 [n, k]; `d` and `m` float16 bits [n, ceil(k / GROUP)]: w = d · code + m."""
        arguments = _in(codes, np.uint8), _in(d, np.uint16), _in(m, np.uint16), *codes.shape, _in(out, np.uint8)
        self.check(self.c.pw_pack_int4(*arguments))

    def pack_w8a8(self, codes: Bytes, out: Bytes) -> None:
        """`codes` [n, k], 128 above what they stand for."""
        self.check(self.c.pw_pack_w8a8(_in(codes, np.uint8), *codes.shape, _in(out, np.uint8)))

    def pack_affine(self, kind: str, codes: Bytes, scales: Floats, zeros: Bytes, group: int, out: Bytes) -> None:
        """w4a16 or w8a16: `codes` [n, k]; `scales` and `zeros` [n, ceil(k / group)]: w = scale · (code − zero)."""
        arrays = _in(codes, np.uint8), _in(scales, np.float32), _in(zeros, np.uint8)
        self.check(self.c.pw_pack_affine(KINDS[kind], *arrays, *codes.shape, group, _in(out, np.uint8)))

    def checksum(self, data: Bytes) -> int:
        value: int = self.c.pw_checksum(_in(data, np.uint8), data.nbytes)
        return value

    def open(self, spec: Spec, threads: int, isa: str = "auto", cpus: int = 0) -> Model:
        """`cpus`: how many may be used at once; 0 is usable_cpus(). More threads than those never spin."""
        return Model(self, spec, self.c.pw_open(byref(spec), threads, cpus or usable_cpus(), isa.encode()))

    def open_beside(self, spec: Spec, other: Model) -> Model:
        """With the instructions and threads of `other`: two teams would wait for each other's CPUs."""
        return Model(self, spec, self.c.pw_open_beside(byref(spec), other.handle))

    def check(self, result: int) -> None:
        if result < 0:
            reason: bytes = self.c.pw_error()
            raise LibraryError(reason.decode())

    def _size(self, result: int) -> int:
        self.check(result)
        return result


class Model:
    """Weights, KV pages and a team of threads. Used by one thread at a time."""

    def __init__(self, library: Library, spec: Spec, handle: int | None) -> None:
        self._library, self._c = library, library.c
        self._spec = spec  # and all that it keeps
        self.handle = handle
        if not self.handle:
            library.check(-1)
        self._adapters: dict[int, Any] = {}
        self._phases: list[str] = self._c.pw_phases().decode().split()
        self._seconds = np.zeros(len(self._phases))

    @property
    def isa(self) -> str:
        name: bytes = self._c.pw_isa(self.handle)
        return name.decode()

    def kv(self) -> Bytes:
        """Its pages [layer, block, bytes], where they are: no longer to be read once the model is closed."""
        spec = self._spec
        shape = spec.num_layers, spec.num_blocks, self._library.kv_block_bytes(spec) // spec.num_layers
        pages = (ctypes.c_uint8 * math.prod(shape)).from_address(self._c.pw_kv(self.handle))
        return np.frombuffer(pages, np.uint8).reshape(shape)

    def set_adapter(self, index: int, loras: Sequence[Lora]) -> None:
        """Of each layer those of LORAS, one layer's behind the other's; empty: rows name `index` no more."""
        array = array_of(loras) if loras else None
        self._library.check(self._c.pw_set_adapter(self.handle, index, array and byref(array)))
        self._adapters[index] = array  # and all that it keeps

    def forward(self, batch: Batch) -> None:
        self._library.check(self._c.pw_forward(self.handle, byref(batch)))

    def sample(self, samples: Samples) -> None:
        self._library.check(self._c.pw_sample(self.handle, byref(samples)))

    def step(self, batch: Batch, samples: Samples) -> None:
        """Both, where no row is masked."""
        self._library.check(self._c.pw_step(self.handle, byref(batch), byref(samples)))

    def repeated(self, batch: Batch, samples: Samples) -> Callable[[], None]:
        """`step` with these two, whose arrays may have changed at each call."""
        check, step, arguments = self._library.check, self._c.pw_step, (self.handle, byref(batch), byref(samples))
        return lambda: check(step(*arguments))

    def logits(self, tokens: Ints) -> Floats:
        """Raw logits [count, vocab] of tokens of the last forward."""
        out = np.empty((len(tokens), self._spec.vocab_size), np.float32)
        self._library.check(self._c.pw_logits(self.handle, _in(tokens, np.int64), len(tokens), address(out)))
        return out

    def hidden(self, tokens: Ints) -> Floats:
        """States after the final norm [count, hidden] of tokens of the last forward."""
        out = np.empty((len(tokens), self._spec.hidden_size), np.float32)
        self._library.check(self._c.pw_hidden(self.handle, _in(tokens, np.int64), len(tokens), address(out)))
        return out

    def states(self, tokens: Ints) -> Floats:
        """The same before the final norm."""
        out = np.empty((len(tokens), self._spec.hidden_size), np.float32)
        self._library.check(self._c.pw_states(self.handle, _in(tokens, np.int64), len(tokens), address(out)))
        return out

    def score(self, tokens: Ints, token_ids: Ints, num_top: NDArray[np.int32]) -> tuple[Doubles, Ints, Ints, Doubles]:
        """Of `token_ids` at `tokens` [count] of the last forward: logprobs, ranks, top ids and their logprobs."""
        count, max_top = len(tokens), int(num_top.max(initial=0))
        logprobs, ranks = np.empty(count), np.empty(count, np.int64)
        top_ids, top_logprobs = np.empty((count, max_top), np.int64), np.empty((count, max_top))
        self._library.check(
            self._c.pw_score(
                self.handle, _in(tokens, np.int64), _in(token_ids, np.int64), _in(num_top, np.int32), count, max_top,
                *(address(out) for out in (logprobs, ranks, top_ids, top_logprobs)),
            )
        )  # fmt: skip
        return logprobs, ranks, top_ids, top_logprobs

    def timings(self) -> dict[str, float]:
        """Seconds of the last step by phase, on the calling thread."""
        self._library.check(self._c.pw_timings(self.handle, address(self._seconds)))
        return dict(zip(self._phases, self._seconds.tolist(), strict=True))

    def close(self) -> None:
        if self.handle:
            self._c.pw_close(self.handle)
            self.handle = None


def _in(array: NDArray[Any], dtype: DTypeLike) -> int:
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(f"an array is {array.dtype} {array.strides}, not contiguous {dtype}")
    return address(array)


_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "pw_abi": (c_int32,),
    "pw_error": (c_char_p,),
    "pw_isas": (c_char_p,),
    "pw_open": (c_void_p, POINTER(Spec), c_int32, c_int32, c_char_p),
    "pw_open_beside": (c_void_p, POINTER(Spec), c_void_p),
    "pw_close": (None, c_void_p),
    "pw_isa": (c_char_p, c_void_p),
    "pw_kv_block_bytes": (c_int64, POINTER(Spec)),
    "pw_kv": (c_void_p, c_void_p),
    "pw_set_adapter": (c_int, c_void_p, c_int32, c_void_p),
    "pw_forward": (c_int, c_void_p, POINTER(Batch)),
    "pw_sample": (c_int, c_void_p, POINTER(Samples)),
    "pw_step": (c_int, c_void_p, POINTER(Batch), POINTER(Samples)),
    "pw_logits": (c_int, c_void_p, c_void_p, c_int32, c_void_p),
    "pw_hidden": (c_int, c_void_p, c_void_p, c_int32, c_void_p),
    "pw_states": (c_int, c_void_p, c_void_p, c_int32, c_void_p),
    "pw_score": (c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32, *(c_void_p,) * 4),
    "pw_phases": (c_char_p,),
    "pw_timings": (c_int, c_void_p, c_void_p),
    "pw_packed_bytes": (c_int64, c_int32, c_int32, c_int32, c_int32),
    "pw_pack_bf16": (c_int, c_void_p, c_int32, c_int32, c_void_p),
    "pw_pack_int8": (c_int, c_void_p, c_int32, c_int32, c_void_p, c_void_p),
    "pw_pack_int4": (c_int, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p),
    "pw_pack_w8a8": (c_int, c_void_p, c_int32, c_int32, c_void_p),
    "pw_pack_affine": (c_int, c_int32, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p),
    "pw_checksum": (c_uint64, c_void_p, c_int64),
}
