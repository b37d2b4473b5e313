"""Any compiler builds the library of C kernels, a wheel with it runs on old systems, and no compiler is no failure."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from stages.kernels import build
from stages.kernels.library import VERSION
from tests.house.source import ROOT, checkout, text

READ = ("pyproject.toml", "README.md", "LICENSE", ".gitignore", "pipeinfer/core/version.py")  # what a build reads
LIBRARY = "stages/kernels/native/libpipeinfer_kernels.so"
HIDE_ZIG = "import sys; sys.modules['ziglang'] = None; "
WHEEL = "from hatchling.build import build_wheel; print(build_wheel('.'))"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout, as far as the build reads it."""
    for name in checkout():
        if name in READ or name.startswith("stages/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "empty").mkdir()
    return tmp_path


def python(tree: Path, program: str, compilers: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run ``program`` in ``tree``; without ``compilers`` there is none on PATH."""
    env = {name: value for name, value in os.environ.items() if name not in {"CC", "PIPEINFER_KERNELS"}}
    env |= environ if compilers else {"PATH": str(tree / "empty"), **environ}
    line = [sys.executable, "-c", program]
    return subprocess.run(line, cwd=tree, env=env, capture_output=True, text=True, timeout=500, check=False)


def here(zig: bool) -> str:
    """Why this compiler is not here; empty if it is."""
    if zig:
        return "" if importlib.util.find_spec("ziglang") and build.zig_serves() else "needs `pip install ziglang`"
    return "" if any(map(shutil.which, ("cc", "gcc", "clang"))) else "needs a C compiler"


@pytest.mark.slow
def test_a_wheel_has_the_library_and_runs_on_old_systems(tree: Path) -> None:
    """Built by ziglang if it is here: `make venv` has used the system's compiler, where there is one."""
    compiler = "cc" if here(zig=True) else "ziglang"
    if why := here(zig=compiler == "ziglang"):
        pytest.skip(why)
    recipe = tree / "stages/kernels/build.py"
    quick = recipe.read_text().replace('"-O3", "-funroll-loops"', '"-O0", "-fno-sanitize=undefined"')
    quick = quick.replace('"portable": ("-O2",)', '"portable": ()')
    quick = re.sub(r'^ +"avx512.*\n', "", quick, flags=re.MULTILINE)  # two variants do
    assert "-O3" not in quick and "-O2" not in quick and quick.count('"avx') == 1
    recipe.write_text(quick)  # a minute less; the speed of this library is nobody's concern
    done = python(tree, WHEEL, compilers=compiler == "cc", PIPEINFER_KERNELS="require")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^pipeinfer: .* is built by .*{compiler}.* in .* s: portable", done.stderr, re.MULTILINE)
    tag = f"py3-none-manylinux_2_17_{os.uname().machine}"
    assert done.stdout.strip().endswith(f"-{tag}.whl")
    with zipfile.ZipFile(tree / done.stdout.strip()) as wheel:
        (about,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("dist-info/WHEEL"))
        wheel.extract(LIBRARY, tree / "empty")
    assert "Root-Is-Purelib: false" in about and f"Tag: {tag}\n" in about
    libraries, versions = build.elf_needs(tree / "empty" / LIBRARY)
    assert libraries == ["libc.so.6"] and versions
    assert all(tuple(map(int, version.removeprefix("GLIBC_").split("."))) <= (2, 17) for version in versions)
    loads = f"import ctypes; print(ctypes.CDLL('empty/{LIBRARY}').pipeinfer_version() > 0)"
    assert python(tree, loads).stdout == "True\n"
    again = python(tree, f"{HIDE_ZIG} from stages.kernels import build; build.main()", compilers=False)
    assert again.stderr == "pipeinfer: libpipeinfer_kernels.so is up to date\n", "neither compiler nor time is needed"


def test_a_wheel_without_a_compiler_is_pure(tree: Path) -> None:
    (tree / LIBRARY).write_bytes(b"built from other sources")
    done = python(tree, HIDE_ZIG + WHEEL, compilers=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("-py3-none-any.whl"), done.stderr
    why = "no C compiler works here (`pip install ziglang` brings one)"
    assert done.stderr == f"pipeinfer: no C kernels, torch computes instead: {why}\n"
    with zipfile.ZipFile(tree / done.stdout.strip()) as wheel:
        assert not [name for name in wheel.namelist() if ".so" in name]
        assert "stages/kernels/native/kernels.c" in wheel.namelist(), "for `python -m stages.kernels.build`"
    assert not (tree / LIBRARY).exists()
    assert python(tree, HIDE_ZIG + WHEEL, compilers=False, PIPEINFER_KERNELS="require").returncode == 1


def test_ziglang_is_asked_for_only_where_it_is_the_only_compiler(tree: Path) -> None:
    asks = "from hatchling.build import *; print(get_requires_for_build_wheel(), get_requires_for_build_sdist())"
    wanted = [build.ZIG_REQUIREMENT] if build.zig_serves() else []
    assert python(tree, asks, compilers=False).stdout == f"{wanted} []\n"
    assert python(tree, asks, compilers=False, PIPEINFER_KERNELS="off").stdout == "[] []\n"
    if not here(zig=False):
        assert python(tree, asks).stdout == "[] []\n"


def test_an_sdist_has_the_sources_and_no_library(tree: Path) -> None:
    (tree / LIBRARY).write_bytes(b"")
    done = python(tree, "from hatchling.build import build_sdist; print(build_sdist('.'))", compilers=False)
    with tarfile.open(tree / done.stdout.strip()) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {name for name in checkout() if name.startswith("stages/kernels/native/")}
    assert {"stages/kernels/build.py", *sources} <= names and LIBRARY not in names


def test_a_source_that_does_not_compile_is_one_line(tree: Path) -> None:
    if why := here(zig=False):
        pytest.skip(why)
    for source in (tree / "stages/kernels/native").glob("*.c"):
        source.write_text("")
    (tree / "stages/kernels/native/broken.c").write_text("int x = ;\n")
    program = "from stages.kernels import build; build.main()"
    done = python(tree, program)
    assert done.returncode == 0 and not (tree / LIBRARY).exists()
    assert re.fullmatch(r"pipeinfer: no C kernels, torch computes instead: .*broken.c:1:9: error: .*\n", done.stderr)
    assert python(tree, program, PIPEINFER_KERNELS="require").returncode == 1
    done = python(tree, program, CC="no-such-compiler")
    assert re.fullmatch(r"pipeinfer: no C kernels, .*: CC=no-such-compiler does not work: .*\n", done.stderr)


@pytest.mark.parametrize(
    ("libraries", "versions", "system"),
    [
        (["libc.so.6"], ["GLIBC_2.2.5", "GLIBC_2.17"], "manylinux_2_17"),
        ([], [], "manylinux_2_17"),
        (["libc.so.6"], ["GLIBC_2.18"], "linux"),
        (["libc.so.6"], ["GLIBC_ABI_DT_RELR"], "linux"),
        (["libc.so.6", "libgomp.so.1"], ["GLIBC_2.2.5"], "linux"),
    ],
)
def test_the_tag_says_what_the_library_needs(
    libraries: list[str], versions: list[str], system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "elf_needs", lambda _: (libraries, versions))
    assert build.platform_tag(Path("x")) == f"{system}_{os.uname().machine}"


def test_kernels_ask_the_processor_themselves() -> None:
    """In a library that ziglang has linked, this function of the compiler says no to every question."""
    for name in checkout():
        if name.startswith("stages/kernels/native/"):
            assert "__builtin_cpu_supports(" not in text(name), f"{name}: use cpuid.h"


def test_a_change_of_the_structures_has_a_new_version() -> None:
    """A bare checkout may have a library of an earlier commit, which would read wrong memory."""
    source = (ROOT / "stages/kernels/native/kernels.h").read_bytes()
    known = {3: 0xB16880CF}
    assert known.get(VERSION) == zlib.crc32(source), "kernels.h has changed: raise its version, here and in dispatch.c"
    assert f"return {VERSION};" in (ROOT / "stages/kernels/native/dispatch.c").read_text(encoding="utf-8")
