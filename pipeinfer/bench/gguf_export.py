"""A Llama model as a GGUF file, llama.cpp's format, as much of it as evaluating token ids takes; the tokenizer only if
asked for.

    python -m pipeinfer.bench.gguf_export [--tokenizer] MODEL FILE

llama.cpp rotates neighbours, and a checkpoint in Hugging Face layout the two halves of a head, so the rows of q and k
are reordered within each head. Matrices become fp16, or what else is asked for; vectors are fp32, as llama.cpp wants
them. The file is written tensor by tensor.
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
from stages.checkpoint.checkpoint import EMBEDDING, HEAD, NORM, Checkpoint, expected_tensors
from stages.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    import torch

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM")
FORMATS = {"fp32": (0, 4), "fp16": (1, 2), "bf16": (32, 2)}
"""GGUF's number of the file type, and the bytes of a number."""
FIX = "install it: pip install 'pipeinfer[peers]'"
ENDS = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


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
            here = _format(shape, form)
            kind = gguf.GGMLQuantizationType({"fp32": 0, "fp16": 1, "bf16": 30}[here])
            nbytes = math.prod(shape) * FORMATS[here][1]
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


def gguf_name(name: str) -> str:
    """What llama.cpp calls the tensor ``name``."""
    if name in ENDS:
        return ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


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
    return form if len(shape) > 1 else "fp32"


def _data(checkpoint: Checkpoint, spec: ModelSpec, name: str, stored: str, form: str) -> Any:
    """A tensor as numpy writes it to the file; numpy has no bf16, so that is 16-bit integers."""
    import torch

    here = _format(checkpoint.tensors[stored].shape, form)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[here]
    tensor = checkpoint.read([stored], dtype)[stored]
    if ".q_proj." in name or ".k_proj." in name:
        tensor = neighbours(tensor, spec.head_dim)
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
