"""What few bits cost: the built-in target in each format, on text that it has not seen.

    python -m benchmarks.quality --out benchmarks/results/quality.jsonl     minutes; one row a format
    python -m benchmarks.quality --picture docs/pictures/quality.png        draws the stored rows
    python -m benchmarks.document                                           puts the table into docs/benchmarks.md

The text is the modules of the Python library that the pair was not trained on, in windows of 1024 tokens. Each format
is made by what `pipeinfer quantize` runs, read from its files, and computed by the kernels; GGUF types need the package
gguf.

perplexity   exp of the mean loss of the text's next token
agreement    share of positions where the most probable token is that of the bfloat16 model
divergence   mean KL(bfloat16 model || model), nats
tokens/s     of plain decoding in one process (--speed); not measured on a busy machine
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import PipeinferError
from pipeinfer.costs.paths import BENCHMARKS

RESULTS = BENCHMARKS / "results" / "quality.jsonl"
WINDOW = 1024
TIMED, CONTEXT = 48, 256
"""Passes of one row whose median is the speed, after so many tokens."""
CALIBRATED_BY = 30
"""Every so-manieth module of the training text calibrates."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table. ``kind``: a format of ``pipeinfer quantize``, a GGUF type with "gguf " before it, or empty
    for the model as it is."""

    name: str
    kind: str = ""
    group: int = 0
    is_calibrated: bool = False


FORMATS = (
    Format("bf16"),
    Format("int8, one scale an output", "int8"),
    Format("int8, groups of 32", "int8", 32),
    Format("GGUF Q8_0", "gguf q8_0"),
    Format("fp6, one scale an output", "fp6"),
    Format("int4, groups of 32", "int4", 32),
    Format("int4, groups of 32, calibrated", "int4", 32, True),
    Format("int4, groups of 64", "int4", 64),
    Format("int4, groups of 128", "int4", 128),
    Format("int4, groups of 128, calibrated", "int4", 128, True),
    Format("GGUF Q4_0", "gguf q4_0"),
)


class Quality:
    """The text, and what the bfloat16 model makes of it. ``windows``: at most so many windows, spread over the text."""

    def __init__(self, windows: int | None = None) -> None:
        from benchmarks.pair.corpus import read_corpus
        from pipeinfer.text import Text
        from stages.checkpoint.spec import ModelSpec

        self.source = model_directory(BUILTIN, "target")
        self.spec = ModelSpec.read(self.source)
        corpus, text = read_corpus(Path(sysconfig.get_path("stdlib"))), Text(self.source)
        documents = [[*text.encode(document), *self.spec.eos_tokens] for document in corpus.held_out.values()]
        cut = [one[start : start + WINDOW + 1] for one in documents for start in range(0, len(one) - 1, WINDOW)]
        self.windows = cut[:: max(1, len(cut) // windows)][:windows] if windows else cut
        modules = list(corpus.train.values())[::CALIBRATED_BY]
        self.calibration = [token for module in modules for token in text.encode(module)]
        self._reference: list[Any] = []

    def rows(self, formats: Sequence[Format], is_timed: bool) -> Iterator[dict[str, Any]]:
        """A row for each of ``formats``, whose first is the reference."""
        from pipeinfer.bench.fingerprint import fingerprint

        for one in formats:
            with tempfile.TemporaryDirectory() as folder:
                model = self.written(one, Path(folder))
                shard, ends = self._opened(model)
                found = self.scores(shard, *ends)
                found["nbytes"] = sum(path.stat().st_size for path in weights_of(model))
            speed = speed_of(shard) if is_timed else None
            row = {"suite": "quality", "execution": "real", "format": one.name, **found, "tokens_per_s": speed}
            yield row | {"fingerprint": fingerprint({}, "")}

    def written(self, one: Format, folder: Path) -> Path:
        """The model in a format: its directory or GGUF file."""
        if not one.kind:
            return self.source
        kind = one.kind.removeprefix("gguf ")
        if kind != one.kind:
            from pipeinfer.bench.gguf_export import export

            return export(self.source, folder / "model.gguf", kind, with_tokenizer=True)
        from pipeinfer.cli.quantize import copy_files, write_model
        from stages.checkpoint.quantizer import open_source

        tokens = self.calibration if one.is_calibrated else None
        write_model(*open_source(self.source), folder, kind, one.group, tokens)
        copy_files(self.source, folder, kind, one.group)
        return folder

    def _opened(self, model: Path) -> tuple[Any, tuple[Any, Any]]:
        """The model as one shard, and its final norm and its head in float32."""
        import torch

        from launch.preflight import clear
        from pipeinfer.core.config import Config
        from stages.checkpoint.checkpoint import HEAD, NORM
        from stages.models.pair import DTYPES, load_llama

        cleared = clear(Config(target=str(model), drafts=()), 1)
        (spec, weights), dtype = cleared.target, DTYPES[cleared.config.dtype]
        head = weights.stored_name(HEAD)
        ends = weights.read([NORM, head], torch.float32)
        return load_llama(spec, weights, range(spec.layer_count), dtype, WINDOW), (ends[NORM], ends[head])

    def scores(self, shard: Any, norm: Any, head: Any) -> dict[str, Any]:
        """Perplexity, agreement and divergence of a model; the first one is the reference of all others."""
        import torch
        import torch.nn.functional as F

        from pipeinfer.bench.chain import run_pass
        from pipeinfer.core.slots import batch_in_order

        is_reference = not self._reference
        loss, agreed, divergence, count = 0.0, 0, 0.0, 0
        for index, window in enumerate(self.windows):
            hidden = torch.as_tensor(run_pass(shard, batch_in_order(window[:-1], 0)))
            logits = F.linear(F.rms_norm(hidden, hidden.shape[-1:], norm, self.spec.norm_eps), head)
            found = logits.log_softmax(-1)
            if is_reference:
                self._reference.append(found)
            wanted = self._reference[index]
            loss += float(F.nll_loss(found, torch.tensor(window[1:]), reduction="sum"))
            agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
            divergence += float((wanted.exp() * (wanted - found)).sum())
            count += len(window) - 1
        return {
            "tokens": count,
            "perplexity": math.exp(loss / count),
            "agreement": agreed / count,
            "divergence": 0.0 if is_reference else divergence / count,
        }


def weights_of(model: Path) -> list[Path]:
    """The files with a model's weights."""
    return sorted(model.glob("*.safetensors")) if model.is_dir() else [model]


def speed_of(shard: Any) -> float:
    """Tokens a second of plain decoding: passes of one row, each with its choice of a token."""
    from pipeinfer.bench.chain import ShardEvaluator

    model, tokens, taken = ShardEvaluator(shard), [1] * CONTEXT, []
    tokens.append(model.choices(tokens, 0, 1)[0])
    for _ in range(TIMED):
        began = time.perf_counter()
        tokens.append(model.choices(tokens[-1:], len(tokens) - 1, 1)[0])
        taken.append(time.perf_counter() - began)
    return 1 / statistics.median(taken)


def formats(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each format, in Markdown: a view of benchmarks.document."""
    from benchmarks.views import table

    lines = [["format", "MB", "perplexity", "agreement", "divergence", "tokens/s"]]
    for row in rows:
        speed = "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
        numbers = f"{row['nbytes'] / 1e6:.2f}", f"{row['perplexity']:.3f}", f"{row['agreement']:.4f}"
        lines.append([row["format"], *numbers, f"{row['divergence']:.5f}", speed])
    return table(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars for each format: its bytes, and how far its tokens are from those of bfloat16."""
    from pipeinfer.plots.style import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILLION, new_figure, save, tidy

    about = ["built-in target", f"{rows[0]['tokens']} held-out tokens", rows[0]["fingerprint"]["cpu"]]
    figure = new_figure(7.2, 0.5 + 0.27 * len(rows), "real", about)
    colors = {"int8": BLUE, "int4": ORANGE, "fp6": GREEN, "GGUF": VERMILLION}
    measures = (
        ("weights, MB", [row["nbytes"] / 1e6 for row in rows], "{:.1f}"),
        ("next token differs from bf16, %", [100 * (1 - row["agreement"]) for row in rows], "{:.1f}"),
        ("KL divergence, millinats", [1e3 * row["divergence"] for row in rows], "{:.2g}"),
    )
    names = [row["format"] for row in rows]
    looks = [SKY if "calibrated" in name else colors.get(name.replace(",", " ").split()[0], GREY) for name in names]
    for axes, (title, lengths, form) in zip(figure.subplots(1, 3, sharey=True), measures, strict=True):
        axes.barh(range(len(rows)), lengths, height=0.7, color=looks)
        for place, length in enumerate(lengths):
            axes.text(length + 0.02 * max(lengths), place, form.format(length), va="center", size=7, color=INK)
        axes.set_xlim(0, 1.2 * max(lengths))
        axes.set_xlabel(title, size=8)
        axes.set_yticks(range(len(rows)), names, size=8)
        tidy(axes)
    axes.invert_yaxis()
    save(figure, path)


def chosen(words: str | None) -> list[Format]:
    """The formats whose names have one of ``words``, and the reference first."""
    asked = words.split(";") if words else [""]
    found = [one for one in FORMATS[1:] if any(word.strip() in one.name for word in asked)]
    if importlib.util.find_spec("gguf") is None and (left := [one for one in found if one.kind.startswith("gguf")]):
        print(f"without the package gguf there is no {' and no '.join(one.name for one in left)}", file=sys.stderr)
        found = [one for one in found if one not in left]
    return [FORMATS[0], *found]


def main() -> int:
    """Measure the formats, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", metavar="WORDS", help="those whose names have one of these words; ; between them")
    parser.add_argument("--windows", type=int, metavar="N", help="at most so many windows of the text (default: all)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch and the kernels (default 1)")
    parser.add_argument("--speed", action="store_true", help="measure tokens/s, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there (default: standard output)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the rows of --out, measure nothing")
    args = parser.parse_args()
    try:
        if args.picture is not None:
            lines = (args.out or RESULTS).read_text(encoding="utf-8").splitlines()
            draw([json.loads(line) for line in lines], args.picture)
            return 0
        return measure(args)
    except PipeinferError as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return error.exit_code


def measure(args: argparse.Namespace) -> int:
    """Measure what ``args`` say; each row is told as it comes."""
    from pipeinfer.bench.passes import use_threads
    from pipeinfer.core.files import write_whole

    use_threads(args.threads)
    rows = []
    for row in Quality(args.windows).rows(chosen(args.formats), args.speed):
        rows.append(json.dumps(row))
        told = f"perplexity {row['perplexity']:.3f}, agreement {row['agreement']:.4f}, {row['divergence']:.5f} nats"
        print(f"{row['format']}: {row['nbytes'] / 1e6:.2f} MB, {told}" if args.out else rows[-1], flush=True)
    if args.out:
        write_whole(args.out, "".join(f"{row}\n" for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
