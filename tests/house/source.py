"""The files of this checkout, as the house tests see them."""

from __future__ import annotations

import ast
import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeinfer", "stages", "speculation", "kvbuffers", "launch")


@functools.cache
def checkout() -> tuple[str, ...]:
    """Every file that git keeps or would keep, by its path from the root."""
    line = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(sorted(name for name in set(listed) if (ROOT / name).is_file()))


def python_files(*folders: str) -> list[str]:
    """The modules below ``folders``."""
    return [name for name in checkout() if name.endswith(".py") and name.startswith(tuple(f"{f}/" for f in folders))]


@functools.cache
def text(name: str) -> str:
    """What is in a file of the checkout."""
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def tree(name: str) -> ast.Module:
    """The syntax tree of a module of the checkout."""
    return ast.parse(text(name), name)


def module_name(name: str) -> str:
    """``stages/models/llama.py`` is ``stages.models.llama``."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(node: ast.AST, eager: bool = False) -> Iterator[str]:
    """Modules that the code below ``node`` imports at run time, those for type checkers left out; with ``eager`` only
    what is imported together with the module. ``from a import b`` counts as ``a`` and as ``a.b``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module and not child.level, "imports are absolute"
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from (name for other in child.orelse for name in imports(other, eager))
        elif not (eager and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(child, eager)
