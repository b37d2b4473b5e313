"""``pipeinfer quantize``: store a model with the weights of its layers in few bits."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import launched
from pipeinfer.core.config import model_directory
from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from stages.checkpoint.checkpoint import Checkpoint
    from stages.checkpoint.spec import ModelSpec

DEFAULT_GROUPS = {"int8": 0, "int4": 128, "fp6": 0}
"""By format: inputs that share a scale; 0: one scale an output."""
COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja", "LICENSE*")
"""Files of a model beside its weights: tokenizer, settings of generation, chat templates, terms."""
LEAST_TOKENS = 64
"""Of a text that calibrates."""
REWRITTEN = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "quantize",
        help="store a model with the weights of its layers in few bits",
        description="Round the linear layers of a model to few bits and write a model directory: int8 and int4 as "
        "compressed-tensors (pack-quantized, weights only), which vLLM and transformers read; fp6 (e3m2) as two bit "
        "planes, which only pipeinfer reads. Embeddings, norms and head stay as they are. The weights are read and "
        "written in blocks, so a model may be larger than memory.",
    )
    parser.set_defaults(command=quantize)
    parser.add_argument("model", metavar="DIR", help="the model: a directory with safetensors, or builtin")
    parser.add_argument("--format", required=True, choices=DEFAULT_GROUPS, help="of the stored weights")
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="inputs that share a scale, a multiple of 32; 0: one scale an output (default: 128 for int4, else 0)",
    )
    parser.add_argument(
        "--calibrate",
        metavar="FILE",
        help="run the model on the text in FILE, and rescale weights by its activations before they are rounded (AWQ)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to write; there must be none yet")


def quantize(args: argparse.Namespace) -> int:
    """Quantise as ``args`` say."""
    launch = launched()
    if launch is not None and not launch.leads:
        return 0  # one rank does it
    from stages.checkpoint.quantizer import open_source, refuse_group

    out = Path(args.out)
    _refuse_occupied(out)
    directory = model_directory(args.model, "target")
    if directory.suffix == ".gguf":
        refuse(f"{directory} is a GGUF file", "give a directory with safetensors")
    spec, checkpoint = open_source(directory)
    group = DEFAULT_GROUPS[args.format] if args.group is None else args.group
    refuse_group(spec, checkpoint, group)
    tokens = None if args.calibrate is None else read_tokens(args.calibrate, directory, spec)
    with whole_directory(out) as folder:
        nbytes = write_model(spec, checkpoint, folder, args.format, group, tokens)
        copy_files(checkpoint.directory, folder, args.format, group)
    print(f"pipeinfer: {out}: {args.format}, {describe(group)}, {nbytes / 1e6:.1f} MB of weights", file=sys.stderr)
    return 0


def describe(group: int) -> str:
    """How many weights share a scale, in words."""
    return f"groups of {group}" if group else "one scale an output"


def read_tokens(path: str, directory: Path, spec: ModelSpec) -> list[int]:
    """The tokens of the text in the file at ``path``. Raises UserError where it cannot calibrate the model."""
    from pipeinfer.text import Text

    if spec.experts is not None:
        refuse(f"--calibrate: {spec.architecture} has experts, which are not rescaled", "leave --calibrate out")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror})", "name a readable file")
    except UnicodeDecodeError as error:
        refuse(f"{path} is not UTF-8 text (byte {error.start})", "convert it, for instance with iconv")
    tokens = Text(directory).encode(text)
    if len(tokens) < LEAST_TOKENS:
        refuse(f"{path} holds {len(tokens)} tokens", f"give at least {LEAST_TOKENS}, better thousands, of usual text")
    return tokens


def write_model(
    spec: ModelSpec, checkpoint: Checkpoint, folder: Path, format: str, group: int, tokens: list[int] | None
) -> int:
    """Write the quantised weights into ``folder`` and return their bytes. ``tokens``: of the text that calibrates.
    Raises OSError."""
    from pipeinfer.cli.progress import ProgressBar
    from stages.checkpoint.quantizer import AsStored, layout, weight_count, write
    from stages.checkpoint.safetensors_writer import SafetensorsWriter

    with (
        SafetensorsWriter(folder, layout(spec, checkpoint, format, group)) as writer,
        ProgressBar(weight_count(spec, checkpoint)) as bar,
    ):
        source = AsStored(checkpoint)
        if tokens is not None:
            from stages.models.activation_scales import Calibrated, windows_of

            source = Calibrated(spec, checkpoint, windows_of(tokens, spec), format, group)
        write(writer, spec, checkpoint, source, format, group, bar.tell)
        writer.finish()
        return writer.nbytes


def copy_files(source: Path, folder: Path, format: str, group: int) -> None:
    """Copy what a model has beside its weights from ``source`` to ``folder``, and write its config.json. Raises
    OSError."""
    from stages.checkpoint.folder import read_config
    from stages.quantization.packing import quantization_config

    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.name not in REWRITTEN and path.is_file():
                place = folder / path.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                try:
                    shutil.copyfile(path, place)
                except PermissionError as error:
                    refuse(f"{path} cannot be read ({error.strerror})", "change its permissions")
    _, config = read_config(source)
    config["quantization_config"] = quantization_config(format, group)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _refuse_occupied(out: Path) -> None:
    if os.path.lexists(out):
        refuse(f"{out} exists", "name a directory that does not, or remove it")
    if not out.resolve().parent.is_dir():
        refuse(f"{out} cannot be written: there is no {out.resolve().parent}", "make that directory first")


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """A new directory beside ``out`` that gets its name at the end; on any error, also a signal, nothing of it stays.

    Raises UserError where it cannot be written."""
    beside = out.parent / f".{out.name}.{os.getpid()}"
    try:
        beside.mkdir()
        yield beside
        _refuse_occupied(out)
        beside.rename(out)
    except OSError as error:
        refuse(f"{out} cannot be written ({error.strerror or error})", "free space, or name a place of yours")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
