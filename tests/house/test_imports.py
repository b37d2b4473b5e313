"""Who may import whom: import-linter's contracts, and what they cannot say."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

from tests.house.source import PACKAGES, ROOT, imports, module_name, python_files, text, tree

HEAVY = {"torch", "transformers", "mpi4py"}
SPEAKS_MPI = {"launch.mpi"}
EAGER_TORCH = re.compile(  # what computes; whoever loads it imports it late
    r"stages\.quantization\.(matrix|unpack|gguf_blocks|rounding|packing|bit_fields)|pipeinfer\.bench\.fused|"
    r"stages\.kernels\.(?!(library|build|cuts|group)$)\w+|"
    r"stages\.models\.(pair|llama|kernel_shard|experts|ends|bulk|rope|generic|activation_scales|streaming|layer_linears|packed_sizes|"
    r"generic_(slots|probe|skeleton|weights|kernels))"
)
LATE_TORCH = re.compile(r"(launch|stages|pipeinfer\.(bench|text|engine))\.")  # may load it inside functions


def top(name: str) -> str:
    return name.partition(".")[0]


def modules() -> dict[str, str]:
    return {module_name(name): name for name in python_files(*PACKAGES)}


def test_contracts() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def folders() -> set[str]:
    """Every folder that the layers name."""
    contracts = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return {name for layer in layers for name in re.findall(r"[\w.]+", layer)}


def test_layers_are_folders_and_every_module_is_in_one() -> None:
    named = folders()
    assert all((ROOT / name.replace(".", "/")).is_dir() for name in named)
    loose = {
        path
        for name, path in modules().items()
        if Path(path).name not in {"__init__.py", "__main__.py"}
        and not any(f"{name}.".startswith(f"{p}.") for p in named)
    }
    assert not loose, "move them into a folder that has a layer in pyproject.toml"


def test_contracts_ignore_nothing() -> None:
    assert "ignore_imports" not in text("pyproject.toml")


def test_no_files_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: {other for other in imports(tree(path)) if other in known} - {name} for name, path in known.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_core_needs_only_the_standard_library_and_numpy() -> None:
    allowed = set(sys.stdlib_module_names) | {"numpy"}
    strangers = {
        (module, name)
        for module, path in modules().items()
        if module.startswith("pipeinfer.core.")
        for name in imports(tree(path))
        if top(name) not in allowed and not name.startswith("pipeinfer.core")
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
        assert not eager or EAGER_TORCH.fullmatch(module), f"{module} imports {eager} when it is imported"
        late = HEAVY & {top(name) for name in imports(tree(path))} - {"mpi4py"}
        assert not late or LATE_TORCH.match(module), f"{module} imports {late}"
        drags = {name for name in imports(tree(path), eager=True) if EAGER_TORCH.fullmatch(name)}
        assert not drags or EAGER_TORCH.fullmatch(module), f"{module} imports {drags}, and torch with it"
