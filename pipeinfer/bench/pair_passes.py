"""Passes of a pair, ours beside llama.cpp's, and what chains of guesses could gain with passes that take that long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeinfer.bench.chain import Evaluator, ShardEvaluator
from pipeinfer.bench.ideal import best_chain, chain_speed
from pipeinfer.bench.passes import use_threads, whole_shard
from pipeinfer.core.metrics import percentile
from stages.checkpoint.opening import open_weights
from stages.checkpoint.spec import ModelSpec

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 32)
LONGEST = 8
"""Chains are of up to so many guesses."""
ROUNDS = 7
"""Of which the median counts. In each, every pass of every model has its turn."""
REST_S = 0.003
"""Before each pass: threads of the model before stop spinning."""
Timed = Callable[[Sequence[int], int, int], float]
"""Seconds of a pass over tokens, the first of which has this position, with so many of the last ones choosing."""


def time_passes(models: Mapping[str, Timed], text: Sequence[int], rows: Sequence[int]) -> dict[str, dict[int, float]]:
    """Milliseconds of passes over the last of ``text``, by model and number of rows; medians of ROUNDS."""
    for timed in models.values():
        timed(text, 0, 1)
    taken: dict[str, dict[int, list[float]]] = {name: {count: [] for count in rows} for name in models}
    for _ in range(ROUNDS):
        for count in rows:
            for name, timed in models.items():
                time.sleep(REST_S)
                taken[name][count].append(timed(text[-count:], len(text) - count, count))
    return {
        name: {count: 1e3 * percentile(found, 0.5) for count, found in by_rows.items()}
        for name, by_rows in taken.items()
    }


def our_evaluator(directory: str | Path, dtype: str, capacity: int) -> ShardEvaluator:
    """The whole model in ``directory`` as one shard of ours."""
    spec = ModelSpec.read(directory)
    return ShardEvaluator(whole_shard(spec, dtype, capacity, open_weights(directory, spec)))


def timed(model: Evaluator) -> Timed:
    """By the wall clock."""

    def run(tokens: Sequence[int], first: int, wanted: int) -> float:
        began = time.perf_counter()
        model.choices(tokens, first, wanted)
        return time.perf_counter() - began

    return run


def measure_pair(
    target: Path, draft: Path, dtype: str, threads: int, prompt: Sequence[int], answer: Sequence[int], beside: bool
) -> dict[str, Any]:
    """Passes of the pair after ``prompt`` and its ``answer`` by the target, in milliseconds by rows, and the share of
    the answer in which the draft's choice is the target's. ``beside``: llama.cpp's passes too."""
    use_threads(threads)
    text = [*prompt, *answer]
    ours = [our_evaluator(folder, dtype, len(text)) for folder in (target, draft)]
    guesses = ours[1].choices(text[:-1], 0, len(answer))
    agreement = sum(guess == token for guess, token in zip(guesses, answer, strict=True)) / len(answer)
    models = {"ours": timed(ours[0]), "draft": timed(ours[1])}
    if beside:
        from pipeinfer.bench.llama_cpp import FORMS, LlamaCppEvaluator

        rivals = [LlamaCppEvaluator(folder, FORMS[dtype], threads) for folder in (target, draft)]
        models |= {"llama.cpp": rivals[0].timed, "llama.cpp's draft": rivals[1].timed}
    found = time_passes(models, text, ROWS)
    length, gain = best_gain(found["ours"], found["draft"][1], agreement)
    return {"pass_ms": found, "agreement": agreement, "best_length": length, "gain": gain}


def best_gain(pass_ms: Mapping[int, float], draft_ms: float, agreement: float) -> tuple[int, float]:
    """The length of chains that gains most over plain decoding, and how many times as fast it is: the best of
    E(k) T(1) / (k d + T(k + 1)), where T(r) is a pass of r rows, d one of the draft, and E(k) the expected tokens of a
    chain of k guesses."""
    length = best_chain(pass_ms.__getitem__, agreement, draft_ms, LONGEST)
    return length, chain_speed(pass_ms.__getitem__, agreement, draft_ms, length) * pass_ms[1]


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What measure_pair found, as a table."""
    passes = {name: {int(rows): taken for rows, taken in by.items()} for name, by in found["pass_ms"].items()}
    yield f"{'passes, ms':<18}" + "".join(f"{rows:>8}" for rows in ROWS)
    for name, by_rows in passes.items():
        yield f"{name:<18}" + "".join(f"{by_rows[rows]:>8.1f}" for rows in ROWS)
    yield (
        f"the draft agrees in {found['agreement']:.3f}; ideal: chains of {found['best_length']}, "
        f"{found['gain']:.2f} times plain decoding"
    )
