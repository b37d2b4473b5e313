"""Files in llama.cpp's quantised types, made by its own library from a file in fp16 or fp32.

    python -m pipeinfer.bench.gguf_export --tokenizer DIR model-f16.gguf
    python -m pipeinfer.bench.llama_quantize model-f16.gguf model-q4_k_m.gguf --type q4_k_m

llama.cpp mixes types: in ``q4_k_m`` some tensors have 6 bits, and rows that are no multiple of 256 an older type.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path

from pipeinfer.bench.llama_cpp import described, library
from pipeinfer.core.errors import PipeinferError, refuse

TYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
"""Numbers of llama_ftype in llama.h."""


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params, and room for what further versions add."""

    _fields_ = (("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("rest", ctypes.c_uint8 * 504))


def quantize(source: Path, path: Path, kind: str, threads: int = 0) -> None:
    """Write the file ``source`` to ``path`` in the type ``kind``, one of TYPES, by ``threads`` threads (0: all). Raises
    UserError where llama.cpp cannot."""
    loaded = library()
    loaded.llama_model_quantize_default_params.restype = _Parameters
    loaded.llama_model_quantize.restype = ctypes.c_uint32
    loaded.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    parameters = loaded.llama_model_quantize_default_params()
    parameters.threads, parameters.type = threads, TYPES[kind]
    if loaded.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(parameters)):
        refuse(f"{described()} cannot quantise {source} to {kind}", "name a GGUF file in fp16, and a folder with room")


def main() -> int:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m pipeinfer.bench.llama_quantize", description=quantize.__doc__)
    parser.add_argument("source", type=Path, help="GGUF file in fp16 or fp32")
    parser.add_argument("file", type=Path, help="where to write it")
    parser.add_argument("--type", choices=TYPES, required=True)
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="default: all cores")
    args = parser.parse_args()
    try:
        quantize(args.source, args.file, args.type, args.threads)
    except PipeinferError as error:
        print(f"pipeinfer.bench.llama_quantize: {error}", file=sys.stderr)
        return error.exit_code
    print(args.file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
