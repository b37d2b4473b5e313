"""Whole passes of the 620M target's shape, ours beside transformers' and llama.cpp's: few rows, and a long prompt."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeinfer.bench import llama_cpp
from pipeinfer.bench.chain import ShardEvaluator
from pipeinfer.bench.inflate import weight_count
from pipeinfer.bench.pair_passes import REST_S, Timed, timed
from pipeinfer.bench.peers import load_transformers
from pipeinfer.bench.shaped_pair import DRAFT_LAYERS, SPEC, PairWeights, write_model
from pipeinfer.core.config import DTYPES
from pipeinfer.core.metrics import percentile
from stages.checkpoint.opening import open_weights
from stages.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    from pipeinfer.bench.kernels import Roofs
    from stages.kernels.library import Library

ROWS = (1, 2, 4, 8, 16, 32)
CONTEXT = 256
PREFILL = 512
ROUNDS = 7
LONG_S = 20.0
"""A pass is not measured again when all its rounds together have taken so long."""
Seconds = dict[tuple[str, str, int], float]
"""Of a pass, by model, format and rows."""


class TransformersPasses:
    """transformers' model in ``directory``, with a cache of keys and values."""

    def __init__(self, directory: Path, dtype: str) -> None:
        from transformers import DynamicCache

        self._model = load_transformers(directory, dtype)
        self._cache: Any = DynamicCache(config=self._model.config)

    def choices(self, tokens: Sequence[int], first: int, wanted: int) -> list[int]:
        """See Evaluator."""
        import torch

        if surplus := self._cache.get_seq_length() - first:
            self._cache.crop(-surplus)
        with torch.inference_mode():
            found = self._model(torch.tensor([tokens]), past_key_values=self._cache, logits_to_keep=wanted)
        return [int(token) for token in found.logits[0].argmax(-1)]


def measure_passes(library: Library, roofs: Roofs) -> Iterator[dict[str, Any]]:
    """A row for each format and number of rows; the last one of a format is a prompt of PREFILL tokens."""
    with tempfile.TemporaryDirectory(prefix="pipeinfer-kernels-") as place:
        folder = Path(place) / "model"
        write_model(folder, SPEC, PairWeights(SPEC, DRAFT_LAYERS))
        found: Seconds = {}
        for form in DTYPES:
            models = _models(folder, form, library.threads)
            found |= {(name, form, rows): took for name, rows, took in time_models(models)}
    for form in DTYPES:
        nbytes = weight_count(SPEC) * (4 if form == "fp32" else 2)
        for rows in (*ROWS, PREFILL):
            row = roofs.row(library, "model", form, rows, weight_count(SPEC), nbytes, found["ours", form, rows])
            yield row | beside(found, form, rows)


def beside(found: Seconds, form: str, rows: int) -> dict[str, Any]:
    """What others took for the same pass, in milliseconds, and how many times as fast as they we are; of a prompt, both
    of torch's formats."""
    names = {"torch": ("torch", form), "llama_cpp": ("llama.cpp", form)}
    if rows == PREFILL:
        names |= {f"torch_{other}": ("torch", other) for other in ("fp32", "bf16")}
    here: dict[str, Any] = {}
    for key, (name, other) in names.items():
        took = found.get((name, other, rows))
        here[f"{key}_ms"] = None if took is None else 1e3 * took
        here[f"ratio_{key}"] = None if took is None else took / found["ours", form, rows]
    return here


def time_models(models: dict[str, Timed]) -> Iterator[tuple[str, int, float]]:
    """Model, rows, and the median seconds of a pass after CONTEXT tokens, or of a prompt. Models take turns."""
    tokens = [3 + 97 * index % 2000 for index in range(PREFILL)]
    for rows, first in (*((rows, CONTEXT) for rows in ROWS), (PREFILL, 0)):
        taken: dict[str, list[float]] = {name: [] for name in models}
        for run in models.values():
            if first:
                run(tokens[:first], 0, 1)
            if rows < PREFILL:
                run(tokens[:rows], first, rows)
        for _ in range(ROUNDS):
            for name, run in models.items():
                if sum(taken[name]) < LONG_S:
                    time.sleep(REST_S)
                    taken[name].append(run(tokens[:rows], first, rows if first else 1))
        yield from ((name, rows, percentile(found, 0.5)) for name, found in taken.items())


def _models(folder: Path, form: str, threads: int) -> dict[str, Timed]:
    """Ours, torch's and, where it is installed, llama.cpp's, each ready for a pass."""
    from stages.models.pair import CheckpointPair

    spec = ModelSpec.read(folder)
    pair = CheckpointPair((spec, open_weights(folder, spec)), (), form)
    shard = pair.stage(range(spec.layer_count), CONTEXT + PREFILL)
    models = {"ours": timed(ShardEvaluator(shard)), "torch": timed(TransformersPasses(folder, form))}
    if llama_cpp.is_here():
        models["llama.cpp"] = llama_cpp.LlamaCppEvaluator(folder, llama_cpp.FORMS[form], threads).timed
    return models
