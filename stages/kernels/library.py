"""The C library of decode kernels (native/), loaded by ctypes: which instruction set it uses, and its threads.

The library is built when the package is (build.py). Where it is missing or does not load, shards compute in torch."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
import time
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

PATH = Path(__file__).parent / "native" / "libpipeinfer_kernels.so"
ISA_VARIABLE = "PIPEINFER_ISA"
"""Environment variable: the instruction set to use instead of the best one, or ``none`` for torch."""
LEAVES = 8
PANEL = 16
OUTPUT, DOWN, PHASES = 4, 7, 9
"""Phases of a layer, as in native/kernels.h."""
HEAD_BLOCK = 256
"""Columns of a block of logits."""
SPIN_US = 100
"""How long a thread that has a core of its own waits for work before it sleeps, in microseconds."""


class CLinear(ctypes.Structure):
    """``struct linear`` of native/kernels.h, as the next ones."""

    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("packing", c_void_p),
        ("next", c_void_p),
        ("format", c_int32),
        ("columns", c_int32),
        ("k", c_int32),
        ("cuts", c_int32 * (LEAVES + 1)),
        ("panels", c_int32),
        ("is_integer", c_int32),
    )


class CLayer(ctypes.Structure):
    """``struct layer``."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", CLinear),
        ("output", CLinear),
        ("gate_up", CLinear),
        ("down", CLinear),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("output_tile", c_int32),
        ("down_tile", c_int32),
    )


class CModel(ctypes.Structure):
    """``struct model``."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("stride", "inner", "capacity", "kv_format")),
        ("eps", c_float),
        ("scale", c_float),
        ("rotations", c_void_p),
    )


class CRows(ctypes.Structure):
    """``struct rows``."""

    _fields_ = (
        ("count", c_int32),
        *((name, c_void_p) for name in ("slots", "positions", "sequence", "prefix", "ancestors", "ends")),
        ("canonical", c_void_p),
        *((name, c_void_p) for name in ("x", "normed", "wide", "mixed", "partial")),
        ("partial_size", c_int64),
        ("threads", c_int32),
        ("faults", c_void_p),
        ("layer", c_int32),
        ("first", c_int32),
        ("end", c_int32),
        ("group", c_void_p),
        ("parts", c_void_p),
    )


class CExperts(ctypes.Structure):
    """``struct experts``."""

    _fields_ = (
        ("router", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        *((name, c_int32) for name in ("count", "first", "end", "chosen", "is_normalised")),
    )


class CRoutes(ctypes.Structure):
    """``struct routes``."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in ("scores", "weights", "expert", "members", "starts", "active", "gathered", "inner", "outputs")
    )


class CHead(ctypes.Structure):
    """``struct head``."""

    _fields_ = (
        ("linear", c_void_p),
        ("norm", c_void_p),
        ("positions", c_void_p),
        ("seeds", c_void_p),
        ("temperatures", c_void_p),
        ("eps", c_float),
        ("limit", c_int32),
        ("first", c_int32),
    )


CHOSEN = np.dtype([("total", np.float64), ("token", np.int64), ("logit", np.float32), ("highest", np.float32)])
"""``struct chosen``."""
BEST_NBYTES = 24
"""Of ``struct best``."""


class Table(ctypes.Structure):
    """``struct kernels``; pointers are given as integers."""

    _fields_ = (
        ("name", c_char_p),
        ("has_dot", c_int32),
        ("linear", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int64)),
        ("layer", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)),
        ("attention", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)),
        ("head", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int32, *(c_void_p,) * 4)),
        ("embed", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int32, c_void_p)),
        ("choose_among", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_void_p)),
        ("choose_in_group", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_int32, *(c_void_p,) * 6)),
        ("spread", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int32, c_int32, c_void_p)),
        ("read", ctypes.CFUNCTYPE(c_double, c_void_p, c_int64)),
        ("multiply", ctypes.CFUNCTYPE(c_double, c_int64, c_float)),
        ("experts", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p, c_void_p)),
    )


class Library:
    """The kernels for this process. ``isa``: the instruction set in use, of ``available`` ones, best first;
    ``kernels``: its functions. ``threads``: of the pool that all shards of the process share. ``numerics``, for weights
    packed from now on: ``portable``, or ``fast`` to round activations to bfloat16 where the processor multiplies pairs
    of bfloat16; the bits then differ from other processors', but not with a row's company. ``activations``, for
    quantised weights packed from now on: ``fp32``, or ``int8`` for exact products of bytes."""

    def __init__(self, binary: ctypes.CDLL) -> None:
        binary.pipeinfer_kernels.restype = POINTER(Table)
        binary.pipeinfer_help.restype = binary.pipeinfer_pool.restype = None
        binary.pipeinfer_huge.argtypes = (c_void_p, c_int64)
        binary.pipeinfer_share.argtypes = (c_void_p, c_int)
        binary.pipeinfer_pack.argtypes = (c_void_p, *(c_int,) * 5, c_void_p)
        binary.pipeinfer_pack_quantized.argtypes = (c_void_p, c_void_p, *(c_int,) * 4, c_void_p)
        binary.pipeinfer_pack_quantized.restype = None
        binary.pipeinfer_rotations.argtypes = (c_void_p, c_int, c_float, c_int, c_void_p)
        binary.pipeinfer_group_wait.argtypes = (c_void_p, c_int, c_int64, c_uint64, c_int64)
        binary.pipeinfer_group_publish.argtypes = (c_void_p, c_int64, c_uint64)
        binary.pipeinfer_group_abort.argtypes = (c_void_p,)
        binary.pipeinfer_group_publish.restype = binary.pipeinfer_group_abort.restype = None
        self.binary = binary
        self._tables: dict[str, Table] = {}
        while table := binary.pipeinfer_kernels(len(self._tables)):
            self._tables[table.contents.name.decode()] = table.contents
        self.available = tuple(self._tables)
        self.threads, self._started = 1, 1
        self.numerics, self.activations = "portable", "fp32"
        self._busy: ctypes.c_int32 | None = None
        self.use(self.available[0])

    @property
    def build(self) -> str:
        """A digest of what the library was built from, and how; empty where it does not say."""
        try:
            return ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self.binary, "pipeinfer_build"))).decode()
        except ValueError:
            return ""

    def use(self, isa: str) -> None:
        """From now on use the kernels of ``isa``. Raises KeyError for one that this processor does not have."""
        self.kernels, self.isa = self._tables[isa], isa

    @property
    def is_fused(self) -> bool:
        """Whether the kernels in use have fused multiply-add, and with it the bits of all that have."""
        return self.isa != "portable" or bool(self.binary.pipeinfer_portable_is_fused())

    def set_threads(self, threads: int, spin_us: int = SPIN_US) -> None:
        """Compute with ``threads`` threads, the calling one among them. ``spin_us``: see SPIN_US; 0 where threads are
        more than cores."""
        self.threads = max(1, threads)
        self.binary.pipeinfer_pool(self.threads, spin_us if self.threads > 1 else 0)
        for index in range(self._started, self.threads):
            name = f"pipeinfer kernels {index}"
            threading.Thread(target=self.binary.pipeinfer_help, args=(index,), name=name, daemon=True).start()
        self._started = max(self._started, self.threads)

    def share(self, busy: ctypes.c_int32 | None, cores: int) -> None:
        """Let a job have helping threads only while some of ``cores`` cores are idle. ``busy``: a number in memory that
        all processes on these cores share, where they count their threads at work; None: no sharing."""
        self._busy = busy  # kept alive
        self.binary.pipeinfer_share(None if busy is None else ctypes.addressof(busy), cores)

    def read_roof(self, tensor: torch.Tensor) -> float:
        """Bytes per second at which all threads read the memory of ``tensor`` once."""
        began = time.perf_counter()
        nbytes: float = self.kernels.read(tensor.data_ptr(), tensor.nbytes)
        return nbytes / (time.perf_counter() - began)

    def arithmetic_roof(self, steps: int = 5_000_000) -> float:
        """Multiply-adds of float32 per second, by all threads; ``steps`` long chains of them are timed."""
        began = time.perf_counter()
        count: float = self.kernels.multiply(steps, 1.0)
        return count / (time.perf_counter() - began)


VERSION = 3
"""Of kernels.h, as this file knows it."""
REBUILD = "build it anew (python stages/kernels/build.py)"
_forgone: list[str] = []


@functools.cache
def opened() -> tuple[Library | None, str]:
    """The library, or None and why there is none, in words for the user."""
    asked = os.environ.get(ISA_VARIABLE, "")
    if asked == "none":
        return None, f"{ISA_VARIABLE} is none"
    if not PATH.exists():
        return None, "the library of decode kernels was not built (no C compiler was found at install time)"
    try:
        if not _is_whole(PATH):
            raise OSError(f"{PATH} is damaged")
        binary = ctypes.CDLL(str(PATH))
        binary.pipeinfer_kernels  # noqa: B018 -- what is no such library says so by this name
        if (version := binary.pipeinfer_version()) != VERSION:
            return None, f"the library of decode kernels is of version {version}, not {VERSION}: {REBUILD}"
        found = Library(binary)
        if asked:
            found.use(asked)
    except KeyError:
        return None, f"{ISA_VARIABLE} is {asked}, and this processor has {', '.join(found.available)}"
    except (OSError, AttributeError) as error:
        return None, f"the library of decode kernels does not load ({error})"
    return found, ""


def _is_whole(path: Path) -> bool:
    """Whether the ELF file is as long as its header says; the loader would crash on one that ends early."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64:
        return False
    (sections,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    end: int = sections + size * count
    return head[:4] == b"\x7fELF" and end <= path.stat().st_size


def forgo(why: str) -> None:
    """From now on do without the library in this process: ranks of a job must compute alike."""
    _forgone.append(why)


def library() -> Library | None:
    """The library, or None where shards have to compute in torch (``reason`` says why)."""
    return None if _forgone else opened()[0]


def reason() -> str:
    """Why there is no library, in words for the user; empty where there is one."""
    return _forgone[0] if _forgone else opened()[1]
