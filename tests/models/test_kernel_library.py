"""The library of kernels where it cannot be used as asked: there is one reason, and torch decodes the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.kernels import library as module
from stages.kernels.library import ISA_VARIABLE, PATH, opened
from tests.cli.run import ROOT, here, pipeinfer
from tests.models.walk import NO_KERNELS

pytestmark = NO_KERNELS


@pytest.fixture(autouse=True)
def opened_anew() -> Iterator[None]:
    """The library is opened once in a process, but not here."""
    opened.cache_clear()
    yield
    opened.cache_clear()


def refusal() -> str:
    lib, reason = opened()
    assert lib is None
    assert reason and "\n" not in reason and opened() == (None, reason)
    return reason


def damage(path: Path, kind: str) -> None:
    content = PATH.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "a text": b"not a library\n",
            "a header": content[:64],
            "a half": content[: len(content) // 2],
            "another processor": content[:18] + b"\xb7\x00" + content[20:],  # e_machine: AArch64
            "32 bits": content[:4] + b"\x01" + content[5:],
        }[kind]
    )


@pytest.mark.parametrize("kind", ["empty", "a text", "a header", "another processor", "32 bits"])
def test_a_damaged_library_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PATH.name
    damage(path, kind)
    monkeypatch.setattr(module, "PATH", path)
    assert "does not load" in refusal() and str(path) in refusal()


def test_a_library_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(Path(name) for name in _mapped() if "libc.so" in name)
    monkeypatch.setattr(module, "PATH", other)
    assert "does not load" in refusal() and "pipeinfer_kernels" in refusal()


def _mapped() -> list[str]:
    return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]


def test_a_missing_library_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATH", tmp_path / "absent.so")
    assert "was not built" in refusal()
    opened.cache_clear()
    monkeypatch.setattr(module, "PATH", tmp_path)
    assert "does not load" in refusal()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_library_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PATH.name
    path.write_bytes(PATH.read_bytes())
    path.chmod(0)
    monkeypatch.setattr(module, "PATH", path)
    assert "does not load" in refusal()


@pytest.mark.parametrize("asked", ["avx1024", "AVX2", " ", "portable,avx2"])
def test_an_instruction_set_that_is_not_there(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, asked)
    assert asked in refusal() and "portable" in refusal() and ISA_VARIABLE in refusal()


def test_instruction_sets_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lib, reason = opened()
    assert lib is not None and not reason and lib.isa == lib.available[0] and lib.available[-1] == "portable"
    for isa in lib.available:
        opened.cache_clear()
        monkeypatch.setenv(ISA_VARIABLE, isa)
        again, reason = opened()
        assert again is not None and (again.isa, reason) == (isa, "")
    opened.cache_clear()
    monkeypatch.setenv(ISA_VARIABLE, "none")
    assert refusal() == f"{ISA_VARIABLE} is none"


CUT = """
import sys
from pathlib import Path
from stages.kernels import library
library.PATH = Path(sys.argv[1])
print(library.opened())
"""


def test_half_a_library_is_refused(tmp_path: Path) -> None:
    """In a process of its own: the loader reads beyond the end of the file."""
    path = tmp_path / PATH.name
    damage(path, "a half")
    done = subprocess.run([sys.executable, "-c", CUT, path], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done
    assert done.stdout.startswith("(None, ") and "is damaged" in done.stdout and "does not load" in done.stdout


@pytest.mark.slow
def test_decoding_without_the_best_kernels() -> None:
    """The built-in pair in fp32: the same tokens on the best kernels, on portable ones and in torch."""
    prompt = ("--prompt", "def mean(values):", "--max-new-tokens", "32", "--ignore-eos", "--json", "--ranks", "1")
    told = []
    runs = [here("run", *prompt, "--draft", "none"), here("run", *prompt)]
    runs += [pipeinfer("run", *prompt, environ={ISA_VARIABLE: isa}) for isa in ("portable", "none", "avx1024")]
    for done in runs:
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout)["tokens"])
    assert len(told[0]) == 32 and told == [told[0]] * len(told)
