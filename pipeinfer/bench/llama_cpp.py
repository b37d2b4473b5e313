"""llama.cpp as an evaluator of token ids, through the shared library that a Python package brings.

The package is llama-cpp-python, which is compiled for this processor when it is installed, or else xllamacpp, whose
wheels are for any processor with AVX2. Of both only the library is used, through llama.h; the packages themselves are
not imported. What differs between versions of llama.h is not relied upon: parameters are structures that llama.cpp
fills with defaults, of which only the first number, the context, is changed. They are given more room than they need,
which does no harm where they are the last argument.

Times are those of ``llama_decode`` alone. Choosing the best token from the logits, in Python, is not counted.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeinfer.bench.chain import decode
from pipeinfer.bench.gguf_export import FIX, export
from pipeinfer.core.config import DEFAULT_CONTEXT
from pipeinfer.core.errors import refuse
from stages.checkpoint.folder import is_gguf_name
from stages.checkpoint.spec import ModelSpec

LIBRARIES = (
    ("llama_cpp", "llama-cpp-python", "lib/libllama.so"),
    ("xllamacpp", "xllamacpp", "xllamacpp.abi3.so"),
)
"""Module, distribution, and where in the module the library is; the first one that is installed is used."""
CHUNK = 512
"""Rows of a pass at most, as by default in llama.cpp."""
FORMS = {"fp32": "fp32", "bf16": "fp16", "fp16": "fp16"}
"""Our dtypes as GGUF's; llama.cpp is faster with fp16 than with bf16."""
LENGTHS = range(2, 9)
"""Of a chain of guesses, where none is asked for."""
QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


class _Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params, and room for what further versions add."""

    _fields_ = (("first", ctypes.c_uint32), ("rest", ctypes.c_uint8 * 508))


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


SIGNATURES = (
    ("llama_backend_init", None, ()),
    ("llama_log_set", None, (ctypes.c_void_p, ctypes.c_void_p)),
    ("llama_model_default_params", _Parameters, ()),
    ("llama_context_default_params", _Parameters, ()),
    ("llama_model_load_from_file", ctypes.c_void_p, (ctypes.c_char_p, _Parameters)),
    ("llama_init_from_model", ctypes.c_void_p, (ctypes.c_void_p, _Parameters)),
    ("llama_n_ctx", ctypes.c_uint32, (ctypes.c_void_p,)),
    ("llama_set_n_threads", None, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
    ("llama_get_memory", ctypes.c_void_p, (ctypes.c_void_p,)),
    ("llama_memory_seq_rm", ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    ("llama_batch_init", _Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    ("llama_decode", ctypes.c_int32, (ctypes.c_void_p, _Batch)),
    ("llama_synchronize", None, (ctypes.c_void_p,)),
    ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
    ("llama_print_system_info", ctypes.c_char_p, ()),
)


def source() -> tuple[str, Path] | None:
    """The distribution that brings llama.cpp, with its version, and the library; None where none is installed."""
    for module, distribution, place in LIBRARIES:
        found = find_spec(module)
        for folder in (found.submodule_search_locations or ()) if found else ():
            if (path := Path(folder) / place).is_file():
                return f"{distribution} {metadata.version(distribution)}", path
    return None


def is_here() -> bool:
    """Whether the packages are installed."""
    return source() is not None and find_spec("gguf") is not None


def require() -> None:
    """Raise UserError unless llama.cpp can be used here."""
    if not is_here():
        refuse("llama.cpp or gguf is missing", FIX)


@functools.cache
def library() -> ctypes.CDLL:
    """llama.cpp, ready for use. Raises UserError where it is missing."""
    require()
    found = source()
    assert found is not None
    try:
        loaded = ctypes.CDLL(str(found[1]))
        for name, result, arguments in SIGNATURES:
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        refuse(f"{found[0]} cannot be used ({error})", "install another version")
    loaded.llama_log_set(ctypes.cast(QUIET, ctypes.c_void_p), None)
    loaded.llama_backend_init()
    return loaded


def described() -> str:
    """Which llama.cpp this is, and what it makes of the processor."""
    flags = library().llama_print_system_info().decode()
    known = [word for word in ("AVX512_BF16", "AVX512", "AVX2", "NEON") if f"{word} = 1" in flags]
    found = source()
    return f"{found[0] if found else 'none'}, {known[0] if known else 'portable'}"


@functools.cache
def _model(directory: Path, form: str) -> int:
    """llama.cpp's model of the weights in ``directory``, or of the GGUF file of that name; the file that is made of a
    directory is gone from its folder, but stays mapped."""
    if is_gguf_name(directory):
        return _loaded(directory, directory)
    with tempfile.TemporaryDirectory(prefix="pipeinfer-gguf-") as place:
        return _loaded(export(directory, Path(place) / "model.gguf", form), directory)


def _loaded(path: Path, directory: Path) -> int:
    """llama.cpp's model in the file ``path``, made of ``directory``."""
    loaded = library().llama_model_load_from_file(str(path).encode(), library().llama_model_default_params())
    if not loaded:
        refuse(f"llama.cpp cannot load {directory}", "name a model that it knows")
    return int(loaded)


class LlamaCppEvaluator:
    """The model in ``directory`` under llama.cpp as an Evaluator (see chain); ``form``: see FORMS. A GGUF file is taken
    as it is."""

    def __init__(self, directory: Path, form: str, threads: int) -> None:
        spec = ModelSpec.read(directory)
        self._library, self._vocabulary = library(), spec.vocab_size
        parameters = self._library.llama_context_default_params()
        parameters.first = min(spec.context, DEFAULT_CONTEXT)
        self._context = self._library.llama_init_from_model(_model(directory, form), parameters)
        if not self._context or self._library.llama_n_ctx(self._context) < parameters.first:
            refuse(f"{described()} cannot be used: it does not take the context", "install another version")
        self._library.llama_set_n_threads(self._context, threads, threads)
        self._memory = self._library.llama_get_memory(self._context)
        self._batch = self._library.llama_batch_init(CHUNK, 0, 1)
        self.seconds = 0.0
        """Time in llama_decode so far."""

    def timed(self, tokens: Sequence[int], first: int, wanted: int) -> float:
        """Seconds of llama_decode for these ``choices``."""
        before = self.seconds
        self.choices(tokens, first, wanted)
        return self.seconds - before

    def choices(self, tokens: Sequence[int], first: int, wanted: int) -> list[int]:
        """See Evaluator; ``wanted``: at most CHUNK."""
        self._library.llama_memory_seq_rm(self._memory, 0, first, -1)
        found: list[int] = []
        for start in range(0, len(tokens), CHUNK):
            found += self._pass(tokens[start : start + CHUNK], first + start, len(tokens) - wanted - start)
        return found

    def _pass(self, tokens: Sequence[int], first: int, skipped: int) -> list[int]:
        """One pass over ``tokens``; the choices after all but the first ``skipped`` of them."""
        batch, rows = self._batch, len(tokens)
        batch.n_tokens = rows
        for row, token in enumerate(tokens):
            batch.token[row], batch.pos[row] = token, first + row
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = row >= skipped
        began = time.perf_counter()
        code = self._library.llama_decode(self._context, batch)
        self._library.llama_synchronize(self._context)
        self.seconds += time.perf_counter() - began
        if code:
            refuse(f"llama.cpp cannot evaluate {rows} tokens at position {first} (code {code})", "use shorter texts")
        shown = rows - max(0, skipped)
        if shown <= 0:
            return []
        logits = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (shown, self._vocabulary))
        return [int(token) for token in logits.argmax(1)]


class LlamaCppPeer:
    """llama.cpp's greedy decoding (see Peer); with a draft in chains of ``length`` guesses, one thing after the other.
    ``length`` 0: the fastest of LENGTHS on the first prompt. Emissions are dated by llama.cpp's own time."""

    def __init__(self, name: str, target: Path, draft: Path | None, dtype: str, threads: int, length: int = 0) -> None:
        self.name = name
        self._target = LlamaCppEvaluator(target, FORMS[dtype], threads)
        self._draft = LlamaCppEvaluator(draft, FORMS[dtype], threads) if draft else None
        self._length = length

    @property
    def facts(self) -> dict[str, Any]:
        """See Peer."""
        return {"library": described(), **({"length": self._length} if self._draft else {})}

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[tuple[float, int]], float]:
        """See Peer."""
        if self._draft and not self._length:
            self._length = min(LENGTHS, key=lambda length: self._decode(prompt, count, length)[1][-1][0])
        began = time.monotonic()
        tokens, emitted = self._decode(prompt, count, self._length)
        return tokens, [(began + seconds, given) for seconds, given in emitted], began

    def _decode(self, prompt: list[int], count: int, length: int) -> tuple[list[int], list[tuple[float, int]]]:
        """The tokens; after which time each pass gave how many of them."""
        models = [self._target, *([self._draft] if self._draft else [])]
        before = sum(model.seconds for model in models)
        emitted: list[tuple[float, int]] = []

        def note(given: int) -> None:
            emitted.append((sum(model.seconds for model in models) - before, given))

        return decode(self._target, self._draft, prompt, count, length, note), emitted
