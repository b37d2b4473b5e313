"""Builds the library of C kernels, for a checkout and for wheels.

    python stages/kernels/build.py [OUT]

This file needs the standard library alone. hatchling loads it as the build hook of wheels and of editable
installations (pyproject.toml). The library is never a condition: where it cannot be built, one line says why, and
stages compute with torch. ``PIPEINFER_KERNELS=require`` turns the line into a failure; ``PIPEINFER_KERNELS=off``
builds nothing.

``kernels*.c`` is compiled once per variant, with ``-DVARIANT=name`` and the flags of an instruction set. Every other
file is compiled once, for any processor of the machine's kind, with ``-DHAVE_name`` for each variant.

The compiler is ``$CC``, or one on PATH, or the one in the package ziglang. ziglang is large, so it is a build
requirement only where no other compiler works.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

NATIVE = Path(__file__).resolve().parent / "native"
LIBRARY = NATIVE / "libpipeinfer_kernels.so"

# The same numbers from every compiler: no multiplication and addition become one unless the code says so.
NUMBERS = ("-ffp-contract=off", "-fno-math-errno")
FLAGS = ("-std=gnu11", "-O3", "-funroll-loops", *NUMBERS, "-fvisibility=hidden", "-fPIC")
# An undefined name is an error now, not when the library is loaded. ziglang's own objects have much debug data.
LINK = ("-shared", "-Wl,-z,defs", "-Wl,--strip-debug")
# Some compilers are set up for newer processors. ziglang does not know the flag, and does not need it.
BASELINE = {"x86_64": ("-march=x86-64",)}
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": ("-O2",),  # for processors of before 2013: not worth half of the time of compiling
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512vnni": (*AVX512, "-mavx512vnni"),
        "avx512bf16": (*AVX512, "-mavx512vnni", "-mavx512bf16"),
    },
}

ZIG_MACHINES = ("x86_64", "aarch64")
ZIG_REQUIREMENT = "ziglang>=0.13"
GLIBC = (2, 17)  # of manylinux_2_17: what ziglang links against, and the newest that such a wheel may ask for
COMPILE_S = 300  # a compiler that takes longer hangs

PROBE = """
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
long pipeinfer_probe(void *to, const void *from) { memcpy(to, from, 8); return syscall(SYS_getpid); }
"""
STAMP = '__attribute__((visibility("default"))) const char pipeinfer_build[] = "{}";\n'


class NotBuilt(Exception):
    """Why there is no library, in one line."""


class Toolchain(NamedTuple):
    """A compiler that works, and what it can compile."""

    command: tuple[str, ...]
    flags: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]


def fingerprint() -> str:
    """A hash of all that decides what the library is, except the compiler. The library contains it."""
    digest = hashlib.sha256(platform.machine().encode())
    for path in (Path(__file__), *sorted(NATIVE.glob("*.[ch]"))):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return f"pipeinfer-build-{digest.hexdigest()}"


def is_current(library: Path) -> bool:
    """Whether ``library`` was built from the sources and flags that are here."""
    return library.is_file() and fingerprint().encode() in library.read_bytes()


def run(command: tuple[str, ...], *arguments: str | Path, folder: Path) -> None:
    """Run the compiler ``command``; raises NotBuilt with its first error. ziglang keeps its cache in ``folder``."""
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(folder / "zig"), "ZIG_LOCAL_CACHE_DIR": str(folder / "zig")}
    line = [*command, *map(str, arguments)]
    try:
        done = subprocess.run(
            line, capture_output=True, encoding="utf-8", errors="replace", env={**os.environ, **cache, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL, timeout=COMPILE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(str(error)) from error
    if done.returncode:
        said = [text.strip() for text in done.stderr.splitlines() if text.strip()]
        errors = [text for text in said if "error" in text or "undefined reference" in text]
        compiler = "ziglang" if "ziglang" in command else command[0]
        raise NotBuilt(f"{compiler}: {(errors or said[-1:] or [f'exit code {done.returncode}'])[0]}")


def elf_kind(path: Path) -> bytes:
    """Word size, byte order and processor of an ELF file."""
    with path.open("rb") as file:
        head = file.read(20)
    return head[:6] + head[18:]


def probe(command: tuple[str, ...], folder: Path) -> Toolchain:
    """What ``command`` compiles for this Python; raises NotBuilt if it cannot make a library that this Python loads."""
    source, made = folder / "probe.c", folder / "probe.so"
    source.write_text(PROBE, encoding="utf-8")

    def refusal(*flags: str) -> str:
        try:
            run(command, *FLAGS, *flags, "-c", "-o", folder / f"probe{'_'.join(flags)}.o", source, folder=folder)
        except NotBuilt as why:
            return str(why)
        return ""

    machine = platform.machine()
    baseline = BASELINE.get(machine, ())
    flags = FLAGS if baseline and refusal(*baseline) else (*FLAGS, *baseline)
    run(command, *flags, *LINK, "-o", made, source, folder=folder)
    if elf_kind(made) != elf_kind(Path("/proc/self/exe")):
        raise NotBuilt(f"{shlex.join(command)} compiles for another machine than this Python's")
    variants = VARIANTS.get(machine, {"portable": ()})
    return Toolchain(command, flags, {name: more for name, more in variants.items() if not (more and refusal(*more))})


def find_compiler(folder: Path, zig: bool = True) -> Toolchain:
    """The first compiler that works: ``$CC`` alone if it is set, else one on PATH, else ziglang's if ``zig``."""
    if sys.platform != "linux":
        raise NotBuilt(f"the kernels are for Linux, and this is {sys.platform}")
    if named := os.environ.get("CC"):
        try:
            return probe(tuple(shlex.split(named)), folder)
        except NotBuilt as why:
            raise NotBuilt(f"CC={named} does not work: {why}") from why
    commands: list[tuple[str, ...]] = [(path,) for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    tried: list[str] = []
    if zig and zig_serves() and importlib.util.find_spec("ziglang"):
        target = f"{platform.machine()}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
        commands.append((sys.executable, "-m", "ziglang", "cc", "-target", target))
    for command in commands:
        try:
            return probe(command, folder)
        except NotBuilt as why:
            tried.append(str(why))
    raise NotBuilt("; ".join(["no C compiler works here (`pip install ziglang` brings one)", *tried]))


def zig_serves() -> bool:
    """Whether ziglang has a compiler for this Python."""
    return sys.platform == "linux" and platform.machine() in ZIG_MACHINES and platform.libc_ver()[0] == "glibc"


def requirements() -> list[str]:
    """What a build needs besides hatchling: ziglang where it can be the compiler and nothing else can."""
    if os.environ.get("PIPEINFER_KERNELS") == "off" or os.environ.get("CC") or not zig_serves() or is_current(LIBRARY):
        return []
    with tempfile.TemporaryDirectory(prefix="pipeinfer-kernels-") as name:
        try:
            find_compiler(Path(name), zig=False)
        except NotBuilt:
            return [ZIG_REQUIREMENT]
    return []


def compile_all(tools: Toolchain, folder: Path) -> list[Path]:
    """Compile every source, as many at a time as there are cores; the object files."""
    stamp = folder / "stamp.c"
    stamp.write_text(STAMP.format(fingerprint()), encoding="utf-8")
    have = [f"-DHAVE_{name}" for name in tools.variants]
    jobs: list[tuple[Path, Path, list[str]]] = []
    for source in (*sorted(NATIVE.glob("*.c")), stamp):
        if source.name.startswith("kernels"):
            for name, flags in tools.variants.items():
                jobs.append((source, folder / f"{source.stem}-{name}.o", [f"-DVARIANT={name}", *flags]))
        else:
            jobs.append((source, folder / f"{source.stem}.o", have))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        compiled = [
            pool.submit(run, tools.command, *tools.flags, *flags, "-c", "-o", made, source, folder=folder)
            for source, made, flags in jobs
        ]
        for future in compiled:
            future.result()
    return [made for _, made, _ in jobs]


def build(out: Path) -> str:
    """Build the library ``out`` unless it is current, and say what was done; raises NotBuilt."""
    if os.environ.get("PIPEINFER_KERNELS") == "off":
        raise NotBuilt("PIPEINFER_KERNELS=off")
    began = time.perf_counter()
    # Processes that have the old library mapped keep it: the new one is another file that takes over the name.
    fresh = out.with_name(f"{out.name}.{os.getpid()}")
    try:
        if is_current(out):
            with contextlib.suppress(OSError):  # of a file that is somebody else's
                os.utime(out)  # for make, which compares times
            return f"{out.name} is up to date"
        with tempfile.TemporaryDirectory(prefix="pipeinfer-kernels-") as name:
            tools = find_compiler(Path(name))
            objects = compile_all(tools, Path(name))
            run(tools.command, *tools.flags, *LINK, "-o", fresh, *objects, folder=Path(name))
            fresh.replace(out)
    except OSError as error:
        raise NotBuilt(str(error)) from error
    finally:
        fresh.unlink(missing_ok=True)
    by = shlex.join(tools.command)
    return f"{out.name} is built by {by} in {time.perf_counter() - began:.1f} s: {', '.join(tools.variants)}"


def provide(out: Path) -> bool:
    """Build ``out`` if that is possible, and print one line. Otherwise a library of other sources is removed."""
    try:
        line, built = build(out), True
    except NotBuilt as why:
        line, built = f"no C kernels, torch computes instead: {why}", False
        with contextlib.suppress(OSError):
            if not is_current(out):
                out.unlink()
    print(f"pipeinfer: {line}", file=sys.stderr)
    if not built and os.environ.get("PIPEINFER_KERNELS") == "require":
        raise SystemExit("pipeinfer: PIPEINFER_KERNELS=require, so there is no installation without C kernels")
    return built


def elf_needs(library: Path) -> tuple[list[str], list[str]]:
    """What an ELF file (64 bits, little-endian) asks for: libraries, and versions of their symbols (``GLIBC_2.14``)."""
    data = library.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    segments: list[tuple[int, ...]] = [
        struct.unpack_from("<IIQQQQ", data, table + number * size) for number in range(count)
    ]

    def place(address: int) -> int:
        return next(
            address - start + offset
            for kind, _, offset, start, _, nbytes in segments
            if kind == 1 and start <= address < start + nbytes
        )

    dynamic: list[tuple[int, int]] = []
    for kind, _, offset, _, _, nbytes in segments:
        if kind == 2:
            dynamic += struct.iter_unpack("<qQ", data[offset : offset + nbytes])
    tags = dict(dynamic)
    strings = place(tags[5])

    def string(offset: int) -> str:
        return data[strings + offset : data.index(b"\0", strings + offset)].decode()

    versions = []
    position = place(tags[0x6FFFFFFE]) if 0x6FFFFFFE in tags else 0
    for _ in range(tags.get(0x6FFFFFFF, 0)):
        _, names, _, first, following = struct.unpack_from("<HHIII", data, position)
        at = position + first
        for _ in range(names):
            *_, text, step = struct.unpack_from("<IHHII", data, at)
            versions.append(string(text))
            at += step
        position += following
    return [string(value) for tag, value in dynamic if tag == 1], versions


def platform_tag(library: Path) -> str:
    """The wheel's platform: manylinux_2_17 if glibc 2.17 and nothing else has all that ``library`` asks for."""
    libraries, versions = elf_needs(library)
    found = [re.fullmatch(r"GLIBC_(\d+)\.(\d+)(?:\.\d+)?", version) for version in versions]
    old = all(match and (int(match[1]), int(match[2])) <= GLIBC for match in found)
    system = f"manylinux_{GLIBC[0]}_{GLIBC[1]}" if old and set(libraries) <= {"libc.so.6"} else "linux"
    return f"{system}_{platform.machine()}"


def get_build_hook() -> type[Any]:
    """The hook, for hatchling."""
    from hatchling.builders.config import BuilderConfig
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class KernelHook(BuildHookInterface[BuilderConfig]):
        """Builds the library in the source tree, and puts it into the wheel."""

        def dependencies(self) -> list[str]:
            """What must be installed before the build."""
            return requirements()

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Build; a wheel with the library is one platform's. An editable installation uses it where it is."""
            if provide(LIBRARY) and version == "standard":
                build_data["artifacts"].append(f"/{LIBRARY.relative_to(Path(self.root).resolve()).as_posix()}")
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{platform_tag(LIBRARY)}"

    return KernelHook


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Builds the library of C kernels.")
    parser.add_argument("out", nargs="?", type=Path, default=LIBRARY, help="the library (default: %(default)s)")
    provide(parser.parse_args().out)


if __name__ == "__main__":
    main()
