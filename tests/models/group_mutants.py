"""The C library with faults of exchanges planted in it, all in one build: ``plant`` says which one is in force."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.kernels.library import Library
from tests.models.kernel_mutants import Builder, opened_at

FAULTS: dict[str, tuple[str, str, str]] = {
    "the_flag_comes_before_the_data": (
        "exchange.h",
        "    struct target part = {group_slot(",
        "    if (PLANTED)\n"
        "        group_publish(group, group_flag(group, group->rank, 0, exchange->epoch, tile), exchange->epoch);\n"
        "    struct target part = {group_slot(",
    ),
    "there_is_one_slot_too_few": (
        "group.h",
        "DATA + (shot * SLOTS + (int64_t)(epoch % SLOTS)) * group",
        "DATA + (shot * SLOTS + (PLANTED ? 0 : (int64_t)(epoch % SLOTS))) * group",
    ),
    "sums_begin_with_the_own_part": (
        "exchange.h",
        "parts[rank] = group_slot(group, rank, 0,",
        "parts[rank] = group_slot(group, PLANTED ? (rank + group->rank) % group->size : rank, 0,",
    ),
    "every_rank_adds_the_bias": (
        "exchange.h",
        "target->ld + column + c, v_load(tile + c));",
        "target->ld + column + c, PLANTED ? biased(linear, tile, column, c) : v_load(tile + c));",
    ),
    "only_the_first_rank_is_waited_for": (
        "exchange.h",
        "if (group_wait(group, rank, group_flag(group, rank, 0, ex",
        "if ((!PLANTED || !rank) && group_wait(group, rank, group_flag(group, rank, 0, ex",
    ),
    "a_result_is_taken_before_it_is_there": (
        "exchange.h",
        "if (group_wait(group, owner,",
        "if (!PLANTED && group_wait(group, owner,",
    ),
    # The first rank reads late, when the others are two exchanges ahead or 20 ms have passed.
    "who_has_chosen_goes_ahead": (
        "head.h",
        "    if (group->rank) { /* until",
        "    struct group hasty;\n"
        "    memcpy(&hasty, group, sizeof hasty), hasty.most_ns = 20000000;\n"
        "    for (int rank = 1; PLANTED && !group->rank && rank < group->size; rank++)\n"
        "        group_wait(&hasty, rank, group_flag(group, rank, 0, epoch, 0), epoch + 2);\n"
        "    if (PLANTED && group->rank) return;\n"
        "    if (group->rank) { /* until",
    ),
}
"""By name: a file, a text that is there once, and what takes its place. PLANTED: whether this fault is in force."""


class Planted:
    """The library at ``path``, made with ``build``."""

    def __init__(self, path: Path) -> None:
        self.lib: Library = opened_at(path)
        self._planted = ctypes.c_int.in_dll(self.lib.binary, "pipeinfer_planted")

    @contextmanager
    def plant(self, name: str) -> Iterator[Library]:
        """The library with the fault ``name`` in force."""
        self._planted.value = 1 + list(FAULTS).index(name)
        try:
            yield self.lib
        finally:
            self._planted.value = 0


def build(folder: Path) -> Planted:
    """A library with all FAULTS, none of them in force."""
    builder = Builder(folder)
    native = folder / "native"
    for number, (name, old, new) in enumerate(FAULTS.values(), 1):
        path = native / name
        source = path.read_text()
        assert source.count(old) == 1, f"{old} is in {name} {source.count(old)} times"
        path.write_text(source.replace(old, new.replace("PLANTED", f"(pipeinfer_planted == {number})")))
    header, source = native / "group.h", native / "group.c"
    declared = "extern int pipeinfer_planted;\n\nstruct group {"
    header.write_text(header.read_text().replace("struct group {", declared, 1))
    source.write_text(source.read_text() + '\n__attribute__((visibility("default"))) int pipeinfer_planted;\n')
    return Planted(builder.rebuild())
