"""What is written is true of the disk, and nothing written is about one machine only."""

from __future__ import annotations

import re

import pytest

from tests.house.source import PACKAGES, ROOT, checkout, text

WRITTEN = (".md", ".py", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ".sh", "Makefile", "run")
DOCUMENTS = [name for name in checkout() if name.endswith(".md")]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

# Letters in brackets keep this file from finding itself.
NOT_HERE = {
    "a path of one machine": re.compile(r"(?<![\w.~/-])/(?:work|root|home)/\w"),
    "a package registry": re.compile(r"pypi\.[o]rg|python[h]osted\.|download\.[p]ytorch\.|--(?:extra-)?[i]ndex-url"),
    "a note to oneself": re.compile(r"\b(?:T[O]DO|F[I]XME|X[X]X)\b"),
}


def written() -> list[str]:
    return [name for name in checkout() if name.endswith(WRITTEN) and "builtin/" not in name]


def without_code(document: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", document, flags=re.DOTALL)


def tree_block() -> dict[str, str]:
    """README's picture of the tree: path -> comment.

    It is the first fenced block in which a line begins with ``pipeinfer/``. Each line is a path, blanks, a comment
    (with or without ``#``). Folders end with ``/``. A path is relative to the nearest line above that is a folder and
    begins further left, or to the root; the lines of a drawn tree count as blanks. A folder with anything listed below
    it must list all its modules and folders; one without is taken as a whole. A line that begins beyond column 20 goes
    on with the comment above it."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text("README.md"), re.MULTILINE | re.DOTALL):
        if not re.search(r"^[\s│├└─]*pipeinfer/\s", block, re.MULTILINE):
            continue
        paths: dict[str, str] = {}
        above: list[tuple[int, str]] = []
        for line in block.splitlines():
            found = re.fullmatch(r"([\s│├└─]*)(\S+)(?:\s+#?\s*(.*))?", line)
            if not found or len(found[1]) > 20:
                continue
            indent, name, comment = len(found[1]), found[2], found[3] or ""
            above = [(left, folder) for left, folder in above if left < indent]
            path = (above[-1][1] if above else "") + name
            paths[path] = comment
            if name.endswith("/"):
                above.append((indent, path))
        return paths
    raise AssertionError("README.md has no picture of the tree")


def folders_in(names: tuple[str, ...], folder: str) -> set[str]:
    return {
        folder + name.removeprefix(folder).split("/")[0] + "/"
        for name in names
        if name.startswith(folder) and "/" in name.removeprefix(folder)
    }


def test_readme_tree_is_on_the_disk() -> None:
    listed = tree_block()
    missing = [path for path in listed if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")]
    assert not missing
    assert not [path for path, comment in listed.items() if not comment], "say what it is"


def test_disk_is_in_the_readme_tree() -> None:
    listed = tree_block()
    assert {f"{package}/" for package in PACKAGES} <= listed.keys()
    opened = {path for path in listed if path.endswith("/") and any(p != path and p.startswith(path) for p in listed)}
    expected = {folder for folder in folders_in(checkout(), "") if not folder.startswith(".")}
    for folder in opened:
        expected |= folders_in(checkout(), folder)
        expected |= {
            name
            for name in checkout()
            if name.startswith(folder)
            and "/" not in name.removeprefix(folder)
            and name.endswith(".py")
            and not name.endswith("__init__.py")
        }
    assert not expected - listed.keys()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name: str) -> None:
    targets = [target.split("#")[0] for target in LINK.findall(without_code(text(name)))]
    broken = [
        target
        for target in targets
        if target and not re.match(r"[a-z]+:", target) and not (ROOT / name).parent.joinpath(target).exists()
    ]
    assert not broken


@pytest.mark.parametrize("what", NOT_HERE)
def test_nothing_written_holds(what: str) -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in written()
        for number, line in enumerate(text(name).splitlines(), 1)
        if NOT_HERE[what].search(line)
    ]
    assert not found, "\n".join(found)
