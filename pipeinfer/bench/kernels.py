"""``pipeinfer bench kernels``: linears and whole passes beside what memory and arithmetic allow, torch and llama.cpp.

Both roofs are measured first: how fast all threads read memory, and how fast they multiply and add numbers that lie in
registers. A linear's weights come from memory, as in a decoder: several copies of a matrix, together larger than any
cache, take turns. Contenders take turns too, and medians count.

``gbs``: bytes of weights per second, in billions; of quantised ones with their scales, as packed. ``ratio_torch``,
``ratio_llama_cpp``: how many times as fast as they. Whole passes have the shape of the 620M target (see shaped_pair);
torch's are those of transformers, llama.cpp's weights are fp32 beside fp32 and else fp16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

from pipeinfer.bench.low_bits import LAYOUTS, random_matrix
from pipeinfer.bench.pair_passes import REST_S
from pipeinfer.bench.passes import use_threads
from pipeinfer.bench.shaped_pair import SPEC
from pipeinfer.core.config import ACTIVATIONS
from pipeinfer.core.errors import refuse
from pipeinfer.core.metrics import percentile
from stages.checkpoint.checkpoint import layer_tensors
from stages.checkpoint.spec import ModelSpec
from stages.kernels.library import Library, reason
from stages.kernels.library import library as loaded

FORMATS = ("bf16", "fp16", "fp32")
FEW_ROWS = (1, 4, 8, 32)
"""Rows of products with quantised weights."""
ROWS = (1, 2, 3, 4, 8, 16, 32)
LARGE = (8192, 4096)
ROUNDS = 7
COLD_NBYTES = 128_000_000
"""Copies of a matrix have so many bytes together, and are two at least: caches of 32 MB hold none when it is needed."""
SWEEP_S = 0.03
"""A measurement is as many products in turn as take this long, each copy several times if they are few."""
ROOF_NBYTES = 512_000_000
ROOF_STEPS = 1 << 22
COLUMNS = {
    "shape": 12, "format": 8, "activations": 11, "rows": 5, "ms": 10, "gbs": 8, "weights_per_ns": 14,
    "of_read_roof": 13, "of_arithmetic_roof": 19, "ratio_torch": 12, "ratio_llama_cpp": 16,
}  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Roofs:
    """``read``: bytes per second; ``arithmetic``: multiply-adds per second."""

    read: float
    arithmetic: float

    def row(self, library: Library, shape: str, form: str, rows: int, weights: int, nbytes: int, took_s: float) -> Row:
        """What is known of ``rows`` rows that took ``took_s`` and met ``weights`` weights of ``nbytes`` bytes."""
        return {
            "shape": shape,
            "format": form,
            "rows": rows,
            "threads": library.threads,
            "isa": library.isa,
            "numerics": library.numerics,
            "activations": library.activations,
            "ms": 1e3 * took_s,
            "gbs": nbytes / took_s / 1e9,
            "weights_per_ns": weights / took_s / 1e9,
            "of_read_roof": nbytes / took_s / self.read,
            "of_arithmetic_roof": rows * weights / took_s / self.arithmetic,
            "read_roof_gbs": self.read / 1e9,
            "arithmetic_roof_gmacs": self.arithmetic / 1e9,
            "ratio_torch": None,
            "ratio_llama_cpp": None,
        }


def measure(threads: int) -> Iterator[Row]:
    """All rows, one after the other. Raises UserError where the kernels are missing."""
    import torch

    from pipeinfer.bench.kernel_passes import measure_passes

    library = kernels()
    use_threads(threads)
    with torch.inference_mode():
        roofs = measure_roofs(library)
        for shape in (LARGE, *sorted(linears_of(SPEC))):
            for form in FORMATS:
                yield from measure_linear(library, roofs, shape, form)
            for form in LAYOUTS:
                yield from measure_quantized(library, roofs, shape, form)
    yield from measure_passes(library, roofs)


def kernels() -> Library:
    """The kernels of this process. Raises UserError where there are none."""
    found = loaded()
    if found is None:
        refuse(f"no kernels: {reason()}", "pipeinfer doctor says more")
    return found


def measure_roofs(library: Library) -> Roofs:
    """Medians of ROUNDS, of memory in pages as large as those of weights."""
    import torch

    from stages.kernels.linear import ARENA

    memory = ARENA.empty(library, (ROOF_NBYTES // 4,), torch.float32).fill_(1.0)
    read = percentile([library.read_roof(memory) for _ in range(ROUNDS)], 0.5)
    return Roofs(read, percentile([library.arithmetic_roof(ROOF_STEPS) for _ in range(ROUNDS)], 0.5))


def linears_of(spec: ModelSpec) -> set[tuple[int, int]]:
    """Shapes [out, in] of the linears of a model."""
    matrices = {(shape[0], shape[1]) for shape in layer_tensors(spec, 0).values() if len(shape) == 2}
    return matrices | {(spec.vocab_size, spec.hidden_size)}


def measure_linear(
    library: Library, roofs: Roofs, shape: tuple[int, int], form: str, all_rows: Sequence[int] = ROWS
) -> Iterator[Row]:
    """Products with a matrix of ``shape`` [out, in] in the format ``form``."""
    import torch

    from stages.kernels.linear import Linear

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[form]
    torch.manual_seed(1)
    weight = (torch.randn(shape) / math.sqrt(shape[1])).to(dtype)
    copies = max(2, math.ceil(COLD_NBYTES / weight.nbytes))
    theirs = [weight.clone() for _ in range(copies)]
    ours = [Linear.pack(weight) for _ in range(copies)]
    for rows in all_rows:
        x = torch.randn(rows, shape[1])
        narrow = x.to(dtype)
        took = in_turn({
            "ours": Sweep([partial(matrix, x) for matrix in ours]),
            "torch": Sweep([partial(torch.nn.functional.linear, narrow, matrix) for matrix in theirs]),
        })  # fmt: skip
        row = roofs.row(library, f"{shape[0]}x{shape[1]}", form, rows, math.prod(shape), weight.nbytes, took["ours"])
        yield row | {"torch_ms": 1e3 * took["torch"], "ratio_torch": took["torch"] / took["ours"]}


def measure_quantized(
    library: Library, roofs: Roofs, shape: tuple[int, int], form: str, all_rows: Sequence[int] = FEW_ROWS
) -> Iterator[Row]:
    """Products with a quantised matrix of ``shape`` [out, in] in the format ``form``, by floats and by bytes. Bytes are
    those of the packed matrix."""
    import torch

    from stages.kernels.linear import Linear

    before, matrix = library.activations, random_matrix(form, *shape)
    try:
        for library.activations in ACTIVATIONS if matrix.kind == "integer" else ACTIVATIONS[:1]:
            first = Linear.pack(matrix)
            copies = max(2, math.ceil(COLD_NBYTES / first.nbytes))
            ours = [first, *[Linear.pack(matrix) for _ in range(copies - 1)]]
            for rows in all_rows:
                x = torch.randn(rows, shape[1])
                took = in_turn({"ours": Sweep([partial(linear, x) for linear in ours])})
                name = f"{shape[0]}x{shape[1]}"
                yield roofs.row(library, name, form, rows, math.prod(shape), first.nbytes, took["ours"])
    finally:
        library.activations = before


class Sweep:
    """Calls that take turns, so that none finds in a cache what it needs; as many at a time as SWEEP_S holds, which is
    long beside what threads take to wake."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self._calls = cycle(calls)
        began = time.perf_counter()
        next(self._calls)()  # what is set up at the first call is not measured
        middle = time.perf_counter()
        next(self._calls)()
        taken_s = min(middle - began, time.perf_counter() - middle)
        self._count = max(1, int(SWEEP_S / max(taken_s, 1e-9)))

    def __call__(self) -> float:
        """Seconds of a call."""
        began = time.perf_counter()
        for call in islice(self._calls, self._count):
            call()
        return (time.perf_counter() - began) / self._count


def in_turn(timed: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians of what each of ``timed`` says, called in turn; idle threads of the one before may stop spinning."""
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, run in timed.items():
            time.sleep(REST_S)
            taken[name].append(run())
    return {name: percentile(found, 0.5) for name, found in taken.items()}


def heading() -> str:
    """The line over a table."""
    return "# " + " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def line(row: Row) -> str:
    """``row`` under that heading."""
    return "  " + " ".join(f"{_shown(row[name]):>{width}}" for name, width in COLUMNS.items())


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
