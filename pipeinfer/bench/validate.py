"""The cost model against real passes on this host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeinfer.bench.passes import clock, one_pass, random_model, use_threads, whole_shard
from pipeinfer.core.metrics import percentile
from pipeinfer.costs.hardware import Hardware
from pipeinfer.costs.roofline import ModelCosts
from pipeinfer.costs.shapes import of_spec
from stages.checkpoint.opening import open_weights
from stages.checkpoint.spec import ModelSpec

ROWS = (1, 2, 4, 8, 16)
CONTEXTS = (64, 1024)
ROUNDS = 9
LARGE = {
    "random-1024": random_model(layers=12, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocab=8192),
    "random-1536": random_model(layers=8, hidden=1536, intermediate=4096, heads=24, kv_heads=24, vocab=8192),
}
"""150 and 250 million weights: more than most caches hold, and still quick."""


@dataclass(slots=True)
class Comparison:
    """A pass of ``rows`` rows that attend to ``context`` slots, output head included; times in seconds."""

    model: str
    dtype: str
    rows: int
    context: int
    predicted_s: float
    taken_s: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """The usual time."""
        return percentile(self.taken_s, 0.5)

    @property
    def best_s(self) -> float:
        """A time with little disturbance by other processes."""
        return min(self.taken_s)

    def error(self, taken_s: float) -> float:
        """How much too long (above 0) or too short the prediction is."""
        return self.predicted_s / taken_s - 1

    def row(self) -> dict[str, Any]:
        """As JSON; times in milliseconds."""
        return {
            "model": self.model,
            "dtype": self.dtype,
            "rows": self.rows,
            "context": self.context,
            "predicted_ms": 1e3 * self.predicted_s,
            "samples_ms": [1e3 * taken_s for taken_s in self.taken_s],
        }


def compare(hardware: Hardware, target: Path, device: str = "cpu") -> list[Comparison]:
    """Time the model in the directory ``target`` and larger ones of random weights on ``device``, in every dtype that
    ``hardware`` knows, with as many threads as its stages have. Takes a minute or two. Raises CheckpointError."""

    use_threads(hardware.cores)
    now = clock(hardware.cores)
    spec = ModelSpec.read(target)
    checkpoint = open_weights(target, spec)
    found: list[Comparison] = []
    for dtype in hardware.arithmetic:
        models = [(target.name, spec, checkpoint), *((name, model, None) for name, model in LARGE.items())]
        for name, model, weights in models:
            costs = ModelCosts(hardware, of_spec(model, name).held_in(dtype))
            shard = whole_shard(model, dtype, max(CONTEXTS), weights, device)
            points = [(rows, context) for context in CONTEXTS for rows in ROWS if context <= model.context]
            here = [Comparison(name, dtype, *point, costs.pass_s(*point)) for point in points]
            passes = [one_pass(shard, *point) for point in points]
            for _ in range(ROUNDS):
                for comparison, run in zip(here, passes, strict=True):
                    run()  # earlier passes have left other data in the cache
                    began = now()
                    run()
                    comparison.taken_s.append(now() - began)
            found += here
    return found


def table(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The comparisons, a line each, and how far off they are."""
    columns = ("predicted_ms", "median_ms", "error_%", "best_ms", "error_%")
    yield f"# {'model':<12}{'dtype':<6}{'rows':>5}{'context':>8}" + "".join(f"{column:>14}" for column in columns)
    for one in comparisons:
        numbers = (1e3 * one.predicted_s, *_pair(one, one.median_s), *_pair(one, one.best_s))
        yield f"{one.model:<14}{one.dtype:<6}{one.rows:>5}{one.context:>8}" + "".join(f"{n:>14.2f}" for n in numbers)
    for what, taken in (("median", "median_s"), ("best", "best_s")):
        errors = sorted((abs(one.error(getattr(one, taken))), one.model, one.dtype, one.rows) for one in comparisons)
        worst = errors[-1]
        middle = percentile([error[0] for error in errors], 0.5)
        yield (
            f"# against the {what} time: median error {100 * middle:.0f} %, "
            f"worst {100 * worst[0]:.0f} % ({worst[1]}, {worst[2]}, {worst[3]} rows)"
        )


def _pair(one: Comparison, taken_s: float) -> tuple[float, float]:
    return 1e3 * taken_s, 100 * one.error(taken_s)
