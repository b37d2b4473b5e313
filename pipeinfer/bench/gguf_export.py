"""A Llama model as a GGUF file, llama.cpp's format, as much of it as evaluating token ids takes; the tokenizer only if
asked for.

    python -m pipeinfer.bench.gguf_export [--tokenizer] MODEL FILE

llama.cpp rotates neighbours, and a checkpoint in Hugging Face layout the two halves of a head, so the rows of q and k
are reordered within each head. Matrices become fp16, or what else is asked for, quantised by the gguf package; vectors
are fp32, as llama.cpp wants them. The file is written tensor by tensor.
"""

from __future__ import annotations

import argparse
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeinfer.bench.gguf_tokenizer import describe_tokenizer
from pipeinfer.core.errors import PipeinferError, refuse
from stages.checkpoint.checkpoint import HEAD, Checkpoint, expected_tensors
from stages.checkpoint.gguf_names import gguf_name
from stages.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    import torch

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM")
FORMATS = {
    "fp32": (0, "F32"), "fp16": (1, "F16"), "bf16": (32, "BF16"),
    "q8_0": (7, "Q8_0"), "q4_0": (2, "Q4_0"), "q4_1": (3, "Q4_1"), "q5_0": (8, "Q5_0"), "q5_1": (9, "Q5_1"),
}  # fmt: skip
"""GGUF's number of the file type, and its name of the type of matrices."""
BLOCK = 32
"""Numbers of a block of the quantised types here."""
FIX = "install it: pip install 'pipeinfer[peers]'"


def export(model: str | Path, path: str | Path, form: str = "fp16", with_tokenizer: bool = False) -> Path:
    """Write the model in the directory ``model`` to ``path`` with matrices in the format ``form``, one of FORMATS.
    Raises UserError for a model or a tokenizer that llama.cpp would compute otherwise, and where the package gguf is
    missing."""
    gguf = package("gguf")
    spec, checkpoint, path = ModelSpec.read(model), Checkpoint(model), Path(path)
    _refuse_unlike_llama(Path(model), spec)
    if checkpoint.quantized.scheme is not None:
        refuse(f"{model}: quantised weights are not exported to GGUF", "use the model's bfloat16 release")
    checkpoint.validate(spec)
    names = {name: checkpoint.stored_name(name) if spec.tied else name for name in expected_tensors(spec)}
    if spec.tied and HEAD in checkpoint.tensors:
        names[HEAD] = HEAD  # stored although tied; transformers uses it, and so do we
    try:
        writer = gguf.GGUFWriter(path, "llama")
        _describe(writer, spec, FORMATS[form][0])
        if with_tokenizer:
            describe_tokenizer(writer, Path(model), spec)
        else:
            writer.add_tokenizer_model("no_vocab")
        for name, stored in names.items():
            shape = checkpoint.tensors[stored].shape
            kind = gguf.GGMLQuantizationType[FORMATS[_format(shape, form)][1]]
            block, block_nbytes = gguf.GGML_QUANT_SIZES[kind]
            nbytes = math.prod(shape) // block * block_nbytes
            writer.add_tensor_info(gguf_name(name), shape, None, nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, stored in names.items():
            writer.write_tensor_data(_data(checkpoint, spec, name, stored, form))
        writer.close()
    except OSError as error:
        refuse(f"{path} cannot be written ({error.strerror})", "name one where there is room for it")
    return path


def package(name: str) -> Any:
    """A package of the extra ``peers``. Raises UserError where it is missing."""
    try:
        return import_module(name)
    except ImportError:
        refuse(f"the package {name} is missing", FIX)


def neighbours(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of ``tensor`` [heads * head_dim, ...], such that within each head i and i + head_dim / 2 follow each
    other."""
    halves = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _refuse_unlike_llama(model: Path, spec: ModelSpec) -> None:
    if spec.architecture not in FAMILIES:
        refuse(f"{model}: {spec.architecture} is not exported to GGUF", f"use one of {', '.join(FAMILIES)}")
    if spec.rope.kind not in ("default", "linear"):
        refuse(f"{model}: rotary embedding {spec.rope.kind} is not exported to GGUF", "use a model without it")
    if spec.window:
        refuse(f"{model}: a sliding window is not exported to GGUF", "use a model without it")


def _describe(writer: Any, spec: ModelSpec, file_type: int) -> None:
    """The metadata of the file, but for the tokenizer."""
    writer.add_file_type(file_type)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.layer_count)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.head_count)
    writer.add_head_count_kv(spec.kv_head_count)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope.theta)
    if spec.rope.kind == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(spec.rope.factor)
    writer.add_layer_norm_rms_eps(spec.norm_eps)


def _format(shape: tuple[int, ...], form: str) -> str:
    """In which of FORMATS a tensor is stored: rows of quantised matrices consist of whole blocks."""
    if len(shape) == 1:
        return "fp32"
    return "fp16" if form.startswith("q") and shape[1] % BLOCK else form


def _data(checkpoint: Checkpoint, spec: ModelSpec, name: str, stored: str, form: str) -> Any:
    """A tensor as numpy writes it to the file; numpy has no bf16, so that is 16-bit integers."""
    import torch

    here = _format(checkpoint.tensors[stored].shape, form)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(here, torch.float32)
    tensor = checkpoint.read([stored], dtype)[stored]
    if ".q_proj." in name or ".k_proj." in name:
        tensor = neighbours(tensor, spec.head_dim)
    if here.startswith("q"):
        quants = package("gguf.quants")
        return quants.quantize(tensor.contiguous().numpy(), package("gguf").GGMLQuantizationType[FORMATS[here][1]])
    return (tensor.view(torch.int16) if here == "bf16" else tensor).contiguous().numpy()


def main() -> int:
    """Write the file that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m pipeinfer.bench.gguf_export", description=export.__doc__)
    parser.add_argument("model", help="directory in Hugging Face layout")
    parser.add_argument("file", help="where to write it")
    parser.add_argument("--format", choices=FORMATS, default="fp16", help="of matrices")
    parser.add_argument(
        "--tokenizer", action="store_true", help="write the tokenizer too, as llama.cpp's server wants it"
    )
    args = parser.parse_args()
    try:
        print(export(args.model, args.file, args.format, args.tokenizer))
    except PipeinferError as error:
        print(f"pipeinfer.bench.gguf_export: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
