"""Parts of files that are read ahead are the files' bytes, in any order of use, with memory for few of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeinfer.core.errors import CheckpointError
from stages.checkpoint.extents import Extent, plain_read, read_extent, reading_through
from stages.weights.read_ahead import ReadAhead


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    path.write_bytes(random.Random(1).randbytes(300_001))
    return path


@pytest.fixture
def ahead() -> Iterator[ReadAhead]:
    made = ReadAhead(100_000)
    yield made
    made.close()


def test_units_have_the_bytes_of_the_file(file: Path, ahead: ReadAhead) -> None:
    seed = random.randrange(1 << 32)
    dice, data = random.Random(seed), file.read_bytes()
    units = []
    for _ in range(40):
        cuts = sorted(dice.randrange(len(data)) for _ in range(4))
        units.append([Extent(file, start, stop - start) for start, stop in itertools.pairwise(cuts) if stop > start])
    ahead.begin(iter(units))
    for unit in units:
        with ahead.unit(), reading_through(ahead):
            for extent in dice.sample(unit, dice.randrange(len(unit) + 1)):  # not all of them are asked for
                inner = Extent(file, extent.start + extent.nbytes // 3, extent.nbytes // 2)
                for asked in (extent, inner):
                    found = bytes(read_extent(asked).numpy())
                    assert found == data[asked.start : asked.end], f"seed {seed}"
            unknown = Extent(file, dice.randrange(1000), 500)
            assert bytes(read_extent(unknown).numpy()) == data[unknown.start : unknown.end], f"seed {seed}"


def test_what_is_used_later_is_read_meanwhile_but_no_more_than_fits(file: Path, ahead: ReadAhead) -> None:
    units = [[Extent(file, start, 20_000)] for start in range(0, 300_000, 20_000)]
    ahead.begin(iter(units))
    with ahead.unit(), reading_through(ahead):
        first = read_extent(units[0][0])
        with ahead._changed:  # threads go on while this waits
            ahead._changed.wait_for(lambda: ahead.nbytes_read >= 80_000)
            assert ahead.nbytes_read <= 100_000
    assert torch.equal(first, plain_read(units[0][0])), "still there as long as somebody has it"


def test_another_order_begins_at_once(file: Path, ahead: ReadAhead) -> None:
    endless = ([Extent(file, start, 30_000)] for start in itertools.cycle((0, 30_000, 60_000)))
    ahead.begin(endless)
    for start in (0, 30_000):
        with ahead.unit(), reading_through(ahead):
            assert torch.equal(read_extent(Extent(file, start, 30_000)), plain_read(Extent(file, start, 30_000)))
    ahead.begin(iter([[Extent(file, 5, 10)]]))
    with ahead.unit(), reading_through(ahead):
        assert torch.equal(read_extent(Extent(file, 5, 10)), plain_read(Extent(file, 5, 10)))


def test_a_file_that_ends_early_is_named_with_the_offset(file: Path, ahead: ReadAhead) -> None:
    beyond = Extent(file, 299_000, 2_000)
    ahead.begin(iter([[beyond]]))
    with ahead.unit(), reading_through(ahead), pytest.raises(CheckpointError, match=rf"^{file} ends before byte \d+"):
        read_extent(beyond)
    with pytest.raises(CheckpointError, match=rf"^{file} ends before byte 300001"):
        plain_read(beyond)


def test_a_file_that_is_missing_or_was_changed_is_refused(file: Path, ahead: ReadAhead) -> None:
    ahead.begin(iter([[Extent(file.with_name("none"), 0, 10)], [Extent(file, 0, 10, (300_000, 0))]]))
    with ahead.unit(), reading_through(ahead), pytest.raises(CheckpointError, match="none cannot be read at byte 0"):
        read_extent(Extent(file.with_name("none"), 0, 10))
    with ahead.unit(), reading_through(ahead), pytest.raises(CheckpointError, match="was changed before it was read"):
        read_extent(Extent(file, 0, 10, (300_000, 0)))
