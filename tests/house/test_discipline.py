"""Sizes, names, and the few habits that a linter does not know."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator

from tests.house.source import PACKAGES, python_files, text, tree

MAX_FILE, MAX_FUNCTION = 400, 60

# What is larger than that, and why. An entry that is no longer needed fails the test too.
LARGE: dict[str, str] = {}
BAD_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc", "tools"}
# launch/environment.py asks before MPI is loaded.
KNOWS_RANK_ZERO = {
    "pipeinfer/placement/roles.py",
    "launch/mpi.py",
    "launch/environment.py",
}
HAS_A_COMMUNICATOR = {"launch/rendezvous.py", "launch/mpi.py", "launch/transport.py"}


def functions(name: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


def test_sizes() -> None:
    files = python_files(*PACKAGES, "benchmarks", "tests")
    lengths = {name: text(name).count("\n") for name in files}
    print("median file:", statistics.median(lengths[name] for name in python_files(*PACKAGES)), "lines")
    large = {name: size for name, size in lengths.items() if size > MAX_FILE}
    large |= {name: size for file in files for name, size in functions(file) if size > MAX_FUNCTION}
    assert large.keys() == LARGE.keys(), f"make them smaller or write the reason in {__file__}: {large}"


def test_names_say_something() -> None:
    names = [(name, part) for name in python_files(*PACKAGES, "benchmarks", "tests") for part in name[:-3].split("/")]
    assert not [name for name, part in names if BAD_NAMES & set(part.lower().split("_"))]


def test_only_placement_knows_rank_zero() -> None:
    for name in set(python_files(*PACKAGES)) - KNOWS_RANK_ZERO:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Compare):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                is_rank = any(side.lower().rsplit(".", 1)[-1].strip("_") in {"rank", "get_rank()"} for side in sides)
                assert not (is_rank and "0" in sides), (
                    f"{name}:{node.lineno} decides by rank; ask pipeinfer.placement.roles"
                )


def test_only_the_transport_has_a_communicator() -> None:
    for name in set(python_files(*PACKAGES)) - HAS_A_COMMUNICATOR:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rsplit(".", 1)[-1].strip("_").lower()
                assert owner not in {"comm", "comm_world"}, f"{name}:{node.lineno} talks MPI; that is launch.mpi's"


def test_tests_do_not_sleep() -> None:
    for name in python_files("tests"):
        for node in ast.walk(tree(name)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called.rsplit(".", 1)[-1] != "sleep", f"{name}:{node.lineno} sleeps; wait for what it waits for"


def test_nothing_is_skipped_without_a_reason() -> None:
    for name in python_files("tests"):
        marks = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)]
        calls = {id(node.func): node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)}
        for mark in marks:
            what = ast.unparse(mark)
            if what in {"pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail", "pytest.skip", "pytest.xfail"}:
                call = calls.get(id(mark))
                words = [keyword.arg for keyword in call.keywords] if call else []
                told = call and ("reason" in words or (call.args and what != "pytest.mark.skipif"))
                assert told, f"{name}:{mark.lineno}: {what} without a reason"
