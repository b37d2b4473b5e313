"""The cores that a rank may use, read from made-up trees of /proc and /sys."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cores import alone, asked_threads, quota, refuse_threads, usable_cores
from pipeinfer.core.errors import UserError

V2 = "sys/fs/cgroup"


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """``root`` with these files, and what this process's /proc/self/cgroup says."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"a/b": "max 100000"}, None),
        ({"a/b": "150000 100000"}, 1.5),
        ({"a/b": "max 100000", "a": "300000 100000"}, 3.0),
        ({"a/b": "400000 100000", "a": "300000 100000"}, 3.0),
        ({"": "200000 100000"}, 2.0),  # a container whose group is mounted as the top
        ({"c": "100000 100000"}, None),  # another one's
        ({"a/b": ""}, None),
        ({"a/b": "many 100000"}, None),
        ({"a/b": "100000 0"}, None),
    ],
)
@pytest.mark.parametrize("mount", [V2, f"{V2}/unified"])
def test_quota_of_version_2(limits: dict[str, str], expected: float | None, mount: str, tmp_path: Path) -> None:
    files = {f"{mount}/{group}/cpu.max": text for group, text in limits.items()}
    assert quota(tree(tmp_path, "0::/a/b", files)) == expected


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_quota_of_version_1(folder: str, tmp_path: Path) -> None:
    at = f"{V2}/{folder}"
    files = {
        f"{at}/job/step/cpu.cfs_quota_us": "-1", f"{at}/job/step/cpu.cfs_period_us": "100000",
        f"{at}/job/cpu.cfs_quota_us": "250000", f"{at}/job/cpu.cfs_period_us": "100000",
        f"{V2}/memory/job/cpu.cfs_quota_us": "1", f"{V2}/memory/job/cpu.cfs_period_us": "1",
    }  # fmt: skip
    assert quota(tree(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job/step\n0::/", files)) == 2.5


def test_a_group_outside_the_namespace_has_no_limit_to_read(tmp_path: Path) -> None:
    assert quota(tree(tmp_path, "0::/../other", {f"{V2}/other/cpu.max": "100000 100000"})) is None


def test_without_a_proc_there_is_no_limit(tmp_path: Path) -> None:
    assert quota(tmp_path) is None
    assert usable_cores(7, tmp_path) == 7


@pytest.mark.parametrize(("limit", "expected"), [("50000", 1), ("150000", 1), ("250000", 2), ("6400000", 4)])
def test_usable_cores_are_whole_and_at_least_one(limit: str, expected: int, tmp_path: Path) -> None:
    assert usable_cores(4, tree(tmp_path, "0::/a", {f"{V2}/a/cpu.max": f"{limit} 100000"})) == expected


@pytest.mark.parametrize(("said", "expected"), [("", 0), ("3", 3), ("0", 1), ("2,4", 0), ("-1", 0), ("٣", 0)])
def test_omp_num_threads(said: str, expected: int) -> None:
    assert asked_threads({"OMP_NUM_THREADS": said}) == expected
    assert asked_threads({}) == 0


def test_what_is_asked_for_counts_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (alone(5), alone()) == (5, 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert alone() == usable_cores()


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_numbers_of_threads_that_cannot_be_meant(threads: int) -> None:
    with pytest.raises(UserError, match=f"--threads {threads}; use 1 to"):
        refuse_threads(threads)
    refuse_threads(None)
