"""Quantised checkpoints with one random damage each: they are read, or refused in one line; nothing else is raised.

    python -m tests.fuzz.quantized --inputs 2000 --seed 1

Each input follows from the seed and its number. Beside what tests/fuzz/damage.py does, numbers of tensors change: those
of a damaged matrix may be others, but never raise anything but a refusal.
"""

from __future__ import annotations

import random
import shutil
import traceback
from collections import Counter
from pathlib import Path

import torch

from launch.preflight import clear
from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from stages.checkpoint.checkpoint import Checkpoint, expected_tensors
from stages.checkpoint.spec import ModelSpec
from tests.fuzz.checkpoints import command_line, judge_refusal
from tests.fuzz.damage import damage_bytes, damage_header, damage_json
from tests.models.quantized_models import FORMATS, write
from tests.models.tiny import make_tiny


def damage(dice: random.Random, folder: Path) -> str:
    """Damage one file of ``folder``; returns what was done."""
    how, weights = dice.random(), folder / "model.safetensors"
    if how < 0.6:
        return damage_json(dice, folder / "config.json")
    if how < 0.9:
        return damage_header(dice, weights)
    return damage_bytes(dice, weights, weights.stat().st_size)


def judge(folder: Path) -> tuple[str, str | None]:
    """How a damaged folder ends, as ``read`` or ``refused``, and the fault if it is one."""
    try:
        clear(Config(str(folder)), 1)
        spec, checkpoint = ModelSpec.read(folder), Checkpoint(folder)
        names = {checkpoint.stored_name(name) if spec.tied else name for name in expected_tensors(spec)}
        checkpoint.read(names, torch.float32)
    except UserError as error:
        return "refused", judge_refusal(error, folder)
    except Exception:
        return "raised", traceback.format_exc()
    return "read", None


def run(seed: int, numbers: range, work: Path) -> tuple[Counter[str], list[str]]:
    """How the inputs ``numbers`` end, and the faults."""
    source = make_tiny(work / "source", "LlamaForCausalLM", num_hidden_layers=1)
    sound = [write(source, work / form, form) for form in FORMATS]
    ends, faults = Counter[str](), []
    for number in numbers:
        dice = random.Random(f"{seed} {number}")
        folder = shutil.copytree(dice.choice(sound), work / "damaged")
        done = damage(dice, folder)
        end, fault = judge(folder)
        ends[end] += 1
        if fault is not None:
            faults.append(f"seed {seed}, input {number}, {done}: {fault}")
        shutil.rmtree(folder)
    return ends, faults


if __name__ == "__main__":
    command_line("quantised checkpoints", run)
