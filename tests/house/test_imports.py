"""Who may import whom: import-linter's contracts, and what they cannot say."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.house.source import PACKAGES, ROOT, imports, module_name, python_files, text, tree

WORDS = {f"pipeinfer.{name}" for name in ("config", "errors", "files", "metrics", "ports", "protocol", "trace")}
GENERIC = {f"stages.generic{part}" for part in ("", "_cells", "_probe", "_skeleton", "_weights")}
SHARDS = {
    f"stages.{name}"
    for name in ("pair", "llama", "emulated", "checkpoint", "rope", "spec", "choices", "sampling", "generic_spec")
}
SHARDS |= GENERIC | {"stages.forced", "stages.random_weights"}
SHARDS |= {"stages.folder", "stages.names", "stages.safetensors_file", "stages.pickle_file", "stages.finite"}
HEAVY = {"torch", "transformers", "mpi4py"}
SPEAKS_MPI = {"launch.mpi"}
EAGER_TORCH = {
    "stages.pair",
    "stages.llama",
    "stages.rope",
    "stages.choices",
    "stages.finite",
    "stages.sampling",
} | GENERIC  # what computes; whoever loads it imports it late
LATE_TORCH = re.compile(r"(launch|stages|pipeinfer\.(bench|text))\.|pipeinfer\.engine$")  # may load it inside functions


def top(name: str) -> str:
    return name.partition(".")[0]


def modules() -> dict[str, str]:
    return {module_name(name): name for name in python_files(*PACKAGES)}


def test_contracts() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_a_place_in_the_layers() -> None:
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    placed = {name for layer in layers for name in re.findall(r"[\w.]+", layer)}
    homeless = [
        name for name in modules() if name not in PACKAGES and not any(f"{name}.".startswith(f"{p}.") for p in placed)
    ]
    assert not homeless, "give them a layer in pyproject.toml"


def test_words_need_only_the_standard_library_and_numpy() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy"}
    strangers = {
        (module, name)
        for module, path in modules().items()
        if module in WORDS
        for name in imports(tree(path))
        if top(name) not in allowed and not any(f"{name}.".startswith(f"{word}.") for word in WORDS)
    }
    assert not strangers


def test_shards_know_only_ports_errors_and_each_other() -> None:
    known = SHARDS | {"pipeinfer.ports", "pipeinfer.errors"}
    strangers = {
        (module, name)
        for module, path in modules().items()
        if module in SHARDS
        for name in imports(tree(path))
        if top(name) in PACKAGES and not any(f"{name}.".startswith(f"{other}.") for other in known)
    }
    assert not strangers


def test_one_file_speaks_mpi() -> None:
    speakers = {module for module, path in modules().items() if "mpi4py" in map(top, imports(tree(path)))}
    assert speakers == SPEAKS_MPI


def test_pictures_are_drawn_only_for_who_asks() -> None:
    for module, path in modules().items():
        if module.startswith("pipeinfer.plots"):
            continue
        eager = set(imports(tree(path), eager=True))
        assert not {"matplotlib", "rich"} & set(map(top, eager)), f"{module} needs an extra when it is imported"
        assert not any(name.startswith("pipeinfer.plots") for name in eager), f"{module} drags matplotlib in"


def test_torch_is_loaded_late_and_only_where_models_are() -> None:
    for module, path in modules().items():
        eager = HEAVY & {top(name) for name in imports(tree(path), eager=True)} - {"mpi4py"}
        assert not eager or module in EAGER_TORCH, f"{module} imports {eager} when it is imported"
        late = HEAVY & {top(name) for name in imports(tree(path))} - {"mpi4py"}
        assert not late or LATE_TORCH.match(module), f"{module} imports {late}"
        drags = EAGER_TORCH & set(imports(tree(path), eager=True))
        assert not drags or module in EAGER_TORCH, f"{module} imports {drags}, and torch with it, when it is imported"
