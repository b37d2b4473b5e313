"""The quantisation methods that checkpoints name: those that are read, and what to use instead of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.quantization.awq import read_awq
from stages.quantization.compressed_config import read_compressed
from stages.quantization.float8 import read_float8
from stages.quantization.fp6 import METHOD, read_fp6
from stages.quantization.gptq import read_gptq
from stages.quantization.scheme import ANOTHER, Scheme, quoted, refuse
from stages.quantization.settings import Settings

METHODS: dict[str, Callable[[Settings], Scheme]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "fp8": read_float8,
    "fbgemm_fp8": read_float8,
    METHOD: read_fp6,
}
"""By ``quant_method``."""
OTHERS = {
    "bitsandbytes": "use the bfloat16 release with `pipeinfer quantize`, or a GPTQ, AWQ or GGUF release",
    "gguf": "name the .gguf file itself instead of a directory",
    "mxfp4": "use a bfloat16 or GGUF release",
}
"""What to use instead of a method, where that is not ANOTHER."""


def read_scheme(content: Any, within: str, usual: str | None = None) -> Scheme:
    """What the object ``content``, found at ``within``, says of a checkpoint. ``usual``: its method if it names none.
    Raises SchemeError."""
    settings = Settings(content, within)
    method = settings.first("quant_method", default=usual)
    if method is None and (settings.first("load_in_4bit") or settings.first("load_in_8bit")):
        method = "bitsandbytes"
    if method is None:
        refuse(f"{within} names no quant_method", ANOTHER)
    name = str(method).lower().replace("compressed_tensors", "compressed-tensors")
    read = METHODS.get(name)
    if read is None:
        name = "bitsandbytes" if name.startswith("bitsandbytes") else name
        refuse(f"weights quantised by {quoted(name)} are not supported", OTHERS.get(name, ANOTHER))
    return read(settings)
