"""The C library with a fault planted in it: built from its sources with one of their lines changed, for tests that must
notice the fault.

``python -m tests.models.kernel_mutants`` prints what notices each fault of sums, and how soon."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.kernels.library import PATH, Library, library
from tests.models.expert_bits import draw_expert_world
from tests.models.kernel_bits import World, check_world, draw_world
from tests.models.quantized_worlds import draw_quantized_world

COMPILER = shutil.which("cc")
FLAGS = "-std=gnu11 -O1 -ffp-contract=off -fno-math-errno -fvisibility=hidden -fPIC"
VARIANT = "-mavx2 -mfma -mf16c -DVARIANT=avx2"
NO_PORTABLE = """#include "kernels.h"
const struct kernels pipeinfer_kernels_portable = {"portable"};
"""
"""What stands for the kernels that no test of a mutant uses."""
PARTS = ("kernels.c", "absent.c", "dispatch.c", "pool.c", "group.c", "pack.c")
WORLDS = 40
"""In how many worlds a fault is looked for."""


@dataclass(frozen=True, slots=True)
class KernelMutant:
    """A fault: in one file the first text of each of ``edits``, which is there once, is the second one. ``first``: the
    first world that it is looked for in."""

    name: str
    edits: tuple[tuple[str, str], ...]
    first: int = 0

    def applied(self, source: str) -> str:
        for old, new in self.edits:
            assert source.count(old) == 1, f"{self.name} is planted in {source.count(old)} places: {old}"
            source = source.replace(old, new)
        return source


def _mutant(name: str, *edits: str, first: int = 0) -> KernelMutant:
    return KernelMutant(name, tuple(zip(edits[::2], edits[1::2], strict=True)), first)


def _one_chain(condition: str) -> tuple[str, str]:
    """Under a ``condition`` a sum is one chain and not eight."""
    old = "int begin = linear->cuts[leaf] / 2, pairs = (linear->cuts[leaf + 1] + 1) / 2 - begin;"
    new = (
        f"int all = (linear->k + 1) / 2, one = {condition}, begin = one ? (leaf ? all : 0) : linear->cuts[leaf] / 2;"
        " int pairs = (one ? all : (linear->cuts[leaf + 1] + 1) / 2) - begin;"
    )
    return old, new


_LIST = "int chunks = ceiling(list.count, POSITIONS), part"
"""Where the slots of a row are known."""
_SORTED = (
    """int64_t sorted[4096];
    for (int i = 0; i < list.count; i++) {
        int64_t slot = slot_of(&list, i);
        int place = i;
        for (; place && sorted[place - 1] > slot; place--) sorted[place] = sorted[place - 1];
        sorted[place] = slot;
    }
    list.canonical = sorted, list.prefix = list.count;
    """
    + _LIST
)
_FMA = "sum[m][p] = v_fma(v_set1(x[m * ldx + 2 * k + 1]), high, sum[m][p])"
_PARTED = "v_add(v_mul(v_set1(x[m * ldx + 2 * k + 1]), high), sum[m][p])"
_NOT_FUSED = _FMA.replace("= ", f"= M == {{}} && sizeof sum[0] / sizeof(vf) == {{}} ? {_PARTED} : ")

_COUNT = "int first = chunk * POSITIONS, count = list.count - first"
_TAIL = "sum = v_fma(v_load(tail), v_load(tail), sum);"

SUMS = [
    _mutant("a_sum_of_many_rows_is_one_chain", *_one_chain("rows > 8")),
    _mutant("a_sum_of_one_row_is_one_chain", *_one_chain("rows == 1")),
    _mutant("a_sum_on_many_threads_is_one_chain", *_one_chain("pool_threads() > 1")),
    _mutant("a_sum_in_the_last_panels_is_one_chain", *_one_chain("panels < 4 && pool_threads() > 2")),
    _mutant("attention_goes_by_slot", _LIST, _SORTED),
    _mutant(
        "attention_begins_a_chunk_after_the_prefix",
        _LIST,
        "int early = model->capacity > POSITIONS && list.count <= POSITIONS && list.prefix;\n"
        "    int chunks = early ? 2 : ceiling(list.count, POSITIONS), part",
        _COUNT,
        "int first = chunk * (early ? list.prefix : POSITIONS);\n"
        "        int count = early && !chunk ? list.prefix : list.count - first",
        first=18,
    ),
    _mutant("four_rows_are_not_fused", _FMA, _NOT_FUSED.format(4, 1)),
    _mutant("one_row_by_four_panels_is_not_fused", _FMA, _NOT_FUSED.format(1, 4)),
    _mutant(
        "the_slot_of_the_next_row_is_read",
        "list.count = list.prefix + (int)(rows->ends[row] - begin);",
        "list.count = list.prefix + (int)(rows->ends[row] - begin) + (row + 1 < rows->count && rows->count > 2);",
    ),
    _mutant(
        "a_norm_on_three_threads_is_not_fused",
        _TAIL,
        f"if (pool_threads() == 3) sum = v_add(sum, v_mul(v_load(tail), v_load(tail))); else {_TAIL}",
        first=11,
    ),
    _mutant(
        "a_total_on_many_threads_is_rounded",
        "chosen.total = chosen.total + part;",
        "chosen.total = pool_threads() > 1 ? (float)(chosen.total + part) : chosen.total + part;",
    ),
]
"""Faults that change bits by company, in every run."""

FOLD = _mutant(
    "lanes_are_folded_otherwise",
    "__m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));",
    "__m128 two = _mm_add_ps(four, _mm_shuffle_ps(four, four, 0xb1));",
    "return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));",
    "return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehl_ps(two, two)));",
)
"""A fault of an instruction set: in all company the same bits, but not those of other processors."""

EXPERTS = [
    _mutant(
        "outputs_of_experts_are_added_in_another_order",
        "sum = v_fma(v_set1(weights[k]), v_load(job->from[owner_of(job, expert[k])] + first + k * ld + i), sum);",
        "{ int turn = job->of.rows->count > 2 ? chosen - 1 - k : k;"
        " sum = v_fma(v_set1(weights[turn]), v_load(job->from[0] + first + turn * ld + i), sum); }",
    ),
    _mutant(
        "an_expert_has_no_more_than_four_rows",
        "int here = expert - job->experts->first;",
        "int here = expert - job->experts->first; rows = rows < 4 ? rows : 4;",
    ),
    _mutant(
        "equal_scores_go_to_the_last_expert_on_many_threads",
        "scores[e] > scores[best])) best = e;",
        "scores[e] > scores[best] || (pool_threads() > 1 && scores[e] == scores[best]))) best = e;",
    ),
    _mutant(
        "weights_are_divided_by_a_sum_of_other_rows",
        "weights[k] = weights[k] / sum;",
        "weights[k] = weights[k] / (sum + (row ? weights[-1] * 0x1p-20f : 0.0f));",
    ),
]
"""Faults of layers with experts that change bits by company, in every run."""

_SUM = "part[m] = v_fma(v_set1(x[m * BLOCK_INPUTS + i]), number, part[m]);"

QUANTIZED = [
    _mutant(
        "a_scale_is_that_of_the_group_before",
        "vf scale = load_scales(header, of->scale_format, place->span",
        "vf scale = load_scales(header, of->scale_format, (place->span ? place->span - 1 : 0)",
    ),
    _mutant(
        "zero_points_of_groups_are_forgotten",
        "return of->zeros ? vi_load_u8(header + of->zeros + group * PANEL) : vi_set1(of->zero);",
        "return vi_set1(of->zero);",
    ),
    _mutant("more_than_a_row_is_read", "to[i] = i < left ? from[i] : 0.0f;", "to[i] = from[i];"),
    _mutant(
        "products_of_bytes_saturate",
        "    if (small)\n        return _mm256_add_epi32(",
        "    if (1)\n        return _mm256_add_epi32(",
    ),
    _mutant(
        "both_halves_of_a_block_have_one_factor",
        "(second && of->group <= second);\n    vf scale",
        "0;\n    vf scale",
    ),
    _mutant(
        "a_row_of_four_has_the_bytes_of_its_neighbour",
        "vi_set1(q[m * BLOCK_INPUTS / 4 + i])",
        "vi_set1(q[(M == 4 && m == 3 ? 2 : m) * BLOCK_INPUTS / 4 + i])",
    ),
    _mutant(
        "minima_of_bytes_are_forgotten",
        "    if (!has_minima) return sum;\n    float x = (float)(",
        "    if (has_minima || !has_minima) return sum;\n    float x = (float)(",
    ),
    _mutant("several_rows_are_not_fused", _SUM, _SUM.replace("v_fma(", "v_add(v_mul(").replace("number,", "number),")),
    _mutant(
        "a_group_begins_a_block_late",
        "(int)(within / (unsigned)of->group)",
        "(int)((within - (within > 0)) / (unsigned)of->group)",
    ),
]
"""Faults of quantised weights: other numbers than those of the library without them."""

RACES = [
    _mutant(
        "threads_share_their_scratch",
        "float *partial = rows->partial + thread * rows->partial_size;",
        "float *partial = rows->partial;",
    ),
    _mutant(
        "a_phase_does_not_wait_for_its_last_chunk",
        "(int)(done = atomic_load(&pool.phase[phase].done)) < chunks;)",
        "(int)(done = atomic_load(&pool.phase[phase].done)) < chunks - 1;)",
    ),
    _mutant("a_late_thread_claims_a_chunk", "(uint32_t)(seen >> 32) == number && ", "number && "),
]
"""Faults that show if threads come at the wrong time; the process may not survive them."""


class Builder:
    """Builds libraries in ``folder``; what a fault does not change is compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(PATH.parent, folder / "native")
        (folder / "native" / "absent.c").write_text(NO_PORTABLE)
        self._compile("kernels.c", VARIANT)
        self._compile("absent.c", "")
        self._compile("dispatch.c", "-DHAVE_avx2")
        self._compile("pool.c", "")
        self._compile("group.c", "")
        self._compile("pack.c", "")

    def _compile(self, name: str, more: str, into: str = "") -> Path:
        assert COMPILER is not None
        made = self.folder / f"{into}{name}.o"
        source = self.folder / "native" / name
        subprocess.run([COMPILER, *FLAGS.split(), *more.split(), "-c", source, "-o", made], check=True)
        return made

    def build(self, mutant: KernelMutant | None = None) -> Path:
        """The library's path, with a fault or without one."""
        assert COMPILER is not None
        parts = {name: self.folder / f"{name}.o" for name in PARTS}
        out = self.folder / f"{mutant.name if mutant else 'sound'}.so"
        if mutant is not None:
            sources, text = (self.folder / "native").glob("*.[ch]"), mutant.edits[0][0]
            places = [source for source in sources if text in source.read_text()]
            assert len(places) == 1, f"{mutant.name} is planted in {places}"
            path = places[0]
            sound = path.read_text()
            path.write_text(mutant.applied(sound))
            changed = path.name if path.name in parts else "kernels.c"
            parts[changed] = self._compile(changed, VARIANT if changed == "kernels.c" else "", mutant.name)
            path.write_text(sound)
        subprocess.run([COMPILER, "-shared", *parts.values(), "-o", out], check=True)
        return out

    def rebuild(self) -> Path:
        """The library of what the sources in ``folder`` have become."""
        assert COMPILER is not None
        made = [self._compile("kernels.c", VARIANT, "new"), self._compile("group.c", "", "new")]
        made += [self.folder / f"{name}.o" for name in PARTS if name not in ("kernels.c", "group.c")]
        out = self.folder / "changed.so"
        subprocess.run([COMPILER, "-shared", *made, "-o", out], check=True)
        return out


def opened_at(path: Path) -> Library:
    """The library there, which has AVX2 alone."""
    found = Library(ctypes.CDLL(str(path)))
    assert found.isa == "avx2"
    return found


def caught(
    lib: Library,
    truth: Library | None = None,
    worlds: Sequence[int] = range(WORLDS),
    cases: int = 6,
    draw: Callable[[int], World] = draw_world,
) -> str:
    """What a test says of the library ``lib``; nothing if its bits do not depend on company."""
    for seed in worlds:
        try:
            check_world(seed, cases, truth or lib, lib, draw)
        except AssertionError as error:
            return str(error).partition("\n")[0]
    return ""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(Path(folder))
        print("sound:", caught(opened_at(builder.build()), library()) or "nothing", flush=True)
        for mutant in SUMS:
            worlds = range(mutant.first, mutant.first + WORLDS)
            print(f"{mutant.name}:", caught(opened_at(builder.build(mutant)), worlds=worlds) or "nothing", flush=True)
        for mutant in EXPERTS:
            found = caught(opened_at(builder.build(mutant)), draw=draw_expert_world)
            print(f"{mutant.name}:", found or "nothing", flush=True)
        for mutant in QUANTIZED:
            found = caught(opened_at(builder.build(mutant)), library(), draw=draw_quantized_world)
            print(f"{mutant.name}:", found or "nothing", flush=True)
        print(f"{FOLD.name}:", caught(opened_at(builder.build(FOLD)), library()) or "nothing", flush=True)


if __name__ == "__main__":
    main()
