"""Weights that are streamed give the bits of resident ones, within the memory that was asked for, and a file that fails
ends the pass with its name and the offset."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.head import LocalJob
from launch.job import load as load_job
from launch.preflight import clear
from launch.requests import RequestOutput
from pipeinfer.core.config import Config
from pipeinfer.core.errors import CheckpointError, UserError
from pipeinfer.core.ports import Request
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec
from stages.kernels.group import slot_nbytes
from stages.models.group_shard import GroupShard
from stages.models.kernel_shard import KernelShard
from stages.models.pair import CheckpointPair
from stages.models.split import Split
from stages.models.weights_plan import shard_plan
from tests.models.grouped import How, following, make_groups
from tests.models.in_process import POLICIES, decode, pair_of
from tests.models.quantized_models import write
from tests.models.tiny import make_tiny, make_tiny_pair
from tests.models.walk import NO_KERNELS, compute, greedy, make_batch

pytestmark = NO_KERNELS
ROOT = Path(__file__).resolve().parents[2]
PROMPT = [17, 301, 5, 488, 92]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases-tied": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen3-files": ("Qwen3ForCausalLM", {"max_shard_size": "300KB", "hidden_size": 72, "intermediate_size": 101}),
}


def load(folder: Path, memory: int, layers: range = range(6), dtype: torch.dtype = torch.float32) -> KernelShard:
    return KernelShard.load(ModelSpec.read(folder), Checkpoint(folder), layers, dtype, 64, memory=memory)


def least(folder: Path, itemsize: int = 4, layers: range = range(6)) -> int:
    """Bytes that are just enough."""
    spec, weights, low, high = ModelSpec.read(folder), Checkpoint(folder), 0, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        try:
            shard_plan(weights, Split(spec), layers, itemsize, middle)
            high = middle
        except UserError:
            low = middle
    return high


def held(shard: KernelShard) -> int:
    """Bytes of weights and buffers, counted tensor by tensor."""
    stream, memory = shard._stream, dict[int, int]()
    assert stream is not None
    resident = [linear.packed for linear in stream._resident.values()]
    vectors = [tensor for layer in shard._layers for tensor in layer.tensors]
    buffers = [buffer._memory for buffer in stream._buffers]
    ends = [end for end in (shard._norm, shard._embedding) if isinstance(end, torch.Tensor)]
    for tensor in (*resident, *vectors, *buffers, *ends):
        memory[tensor.data_ptr()] = tensor.nbytes
    return sum(memory.values()) + len(stream._ahead._region._memory)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("llama-biases-tied", torch.bfloat16), ("qwen3-files", torch.float16)],
)
def test_streamed_layers_give_the_bits_of_resident_ones(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    architecture, overrides = KINDS[kind]
    folder = make_tiny(tmp_path, architecture, dtype=dtype, **overrides)
    resident = KernelShard.load(ModelSpec.read(folder), Checkpoint(folder), range(6), dtype, 64)
    tokens = greedy([resident], PROMPT, 12)
    rows = make_batch(PROMPT, range(5), range(5), [set(range(row)) for row in range(5)])
    numbers = compute([resident], rows)
    smallest = least(folder, dtype.itemsize)
    for memory in (smallest, smallest * 6 // 5, 1 << 30):
        shard = load(folder, memory, dtype=dtype)
        assert greedy([shard], PROMPT, 12) == tokens, memory
        assert torch.equal(compute([shard], rows), numbers)
        plan = shard_plan(Checkpoint(folder), Split(ModelSpec.read(folder)), range(6), dtype.itemsize, memory).plan
        assert plan.is_streaming == (memory < 1 << 30)
        if plan.is_streaming:
            assert 0.95 * memory < shard.weight_nbytes <= memory
            assert held(shard) <= memory + 8192  # the region has whole blocks
            assert held(shard) > 0.95 * memory


@pytest.mark.parametrize("form", ["gptq-4", "fp8-blocks"])
def test_quantised_layers_are_streamed_as_they_are(tmp_path: Path, form: str) -> None:
    folder = write(make_tiny(tmp_path / "source", "LlamaForCausalLM", num_hidden_layers=12), tmp_path / form, form)
    resident = load(folder, 0, range(12))
    memory = resident.weight_nbytes * 4 // 5
    shard = load(folder, memory, range(12))
    assert shard._stream is not None and shard._stream._plan.is_streaming
    assert greedy([shard], PROMPT, 8) == greedy([resident], PROMPT, 8)
    assert 0.95 * memory < held(shard) <= memory + 8192
    assert all(not buffer.extra for buffer in shard._stream._buffers), "each layer fits into its buffer"


@pytest.mark.parametrize("policy", ["continuous", "plain"])
def test_a_job_of_streamed_stages_answers_what_resident_ones_answer(tmp_path: Path, policy: str) -> None:
    """Continuous speculation abandons passes between layers: the stream begins again with the first layer."""
    folders = make_tiny_pair(tmp_path, "LlamaForCausalLM")
    requests = [Request(tuple(PROMPT), 24), Request((7, 151, 64), 16)]
    whole = pair_of(*folders)
    models = [(ModelSpec.read(folder), Checkpoint(folder)) for folder in folders]
    memory = least(folders[0], layers=range(3, 6))
    streamed = CheckpointPair(models[0], models[1:], "fp32", weights_memory=memory)
    expected = [answer.tokens for answer in decode(whole, POLICIES[policy], requests)]
    assert [answer.tokens for answer in decode(streamed, POLICIES[policy], requests)] == expected


class Gate(Checkpoint):
    """A checkpoint whose last layer cannot be read yet."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened = threading.Event()

    def matrices(self, names: Any, dtype: Any, slices: Any = None) -> Any:
        names = list(names)
        if any(name.startswith("model.layers.5.") for name in names):
            assert self.opened.wait(300)
        return super().matrices(names, dtype, slices)


def test_the_first_pass_computes_while_later_layers_load(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "LlamaForCausalLM")
    rows = make_batch(PROMPT, range(5), range(5), [set(range(row)) for row in range(5)])
    gate = Gate(folder)
    shard = KernelShard.load(ModelSpec.read(folder), gate, range(6), torch.float32, 64, memory=1 << 30)
    passes = shard.forward(rows, None)
    assert [next(passes) for _ in range(5)] == [0.0] * 5
    gate.opened.set()
    next(passes)
    with pytest.raises(StopIteration) as end:
        next(passes)
    assert torch.equal(end.value.value, compute([load(folder, 0)], rows))
    assert shard._stream is not None and not shard._stream._plan.is_streaming


def test_a_program_that_ends_while_weights_are_read_ends_in_order(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "LlamaForCausalLM")
    program = (
        "from tests.models.test_streaming import *\n"
        f"shard = load(Path({str(folder)!r}), {least(folder)})\n"
        "greedy([shard], PROMPT, 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_abandoned_passes_leave_the_next_ones_right(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "LlamaForCausalLM")
    shard, seed = load(folder, least(folder)), random.randrange(1 << 32)
    rows = make_batch(PROMPT, range(5), range(5), [set(range(row)) for row in range(5)])
    numbers, dice = compute([load(folder, 0)], rows), random.Random(seed)
    for _ in range(12):
        passes = shard.forward(rows, None)
        for _ in range(dice.randrange(6)):
            next(passes)
        passes.close()
        if dice.random() < 0.5:
            assert torch.equal(compute([shard], rows), numbers), f"seed {seed}"


def test_ranks_of_a_group_stream_their_parts(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "LlamaForCausalLM", num_attention_heads=8)
    spec, weights = ModelSpec.read(folder), Checkpoint(folder)
    expected = greedy([load(folder, 0)], PROMPT, 8)
    assert shard_plan(weights, Split(spec, 1, 2), range(6), 4, 450_000).plan.is_streaming
    groups = make_groups(How(2), slot_nbytes([spec.hidden_size], [spec.vocab_size]))
    parts = [KernelShard.load(spec, weights, range(6), torch.float32, 64, None, group, 450_000) for group in groups]
    leader, _ = [GroupShard(part, group) for part, group in zip(parts, groups, strict=True)]
    with following(groups):
        assert greedy([leader], PROMPT, 8) == expected


def test_too_little_memory_is_refused_with_the_least_that_works(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "LlamaForCausalLM", hidden_size=256, intermediate_size=512)
    spec, weights = ModelSpec.read(folder), Checkpoint(folder)
    with pytest.raises(UserError, match=r"--weights-memory 1000000 bytes are too few .* layers; give \d+M$") as error:
        shard_plan(weights, Split(spec), range(6), 4, 1_000_000)
    least_mebi = int(str(error.value).rsplit(" ", 1)[1][:-1])
    assert shard_plan(weights, Split(spec), range(6), 4, least_mebi << 20).plan.is_streaming
    with pytest.raises(UserError):
        shard_plan(weights, Split(spec), range(6), 4, (least_mebi - 1) << 20)


def test_what_was_decoded_before_a_file_failed_is_kept(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "LlamaForCausalLM")
    config = Config(str(folder), (), weights_memory=1 << 19, context=200)
    request = Request(tuple(PROMPT), 60)
    whole = LocalJob(load_job(clear(config, 1), None), is_threaded=False)
    expected = [token for output in whole.decode(request) for token in output.tokens]
    whole.close()
    outputs, changed = list[RequestOutput](), threading.Condition()

    def on_output(output: RequestOutput) -> None:  # on the thread that drives the job
        outputs.append(output)
        if output.tokens:
            os.truncate(folder / "model.safetensors", 300_000)

    job = LocalJob(load_job(clear(config, 1), None), is_threaded=False)
    job.submit(request, on_output)
    with changed, pytest.raises(CheckpointError, match=r"model.safetensors .* at byte \d+"):
        job.wait(changed, lambda: bool(outputs) and outputs[-1].is_last)
    job._job.kill()
    kept = [token for output in outputs for token in output.tokens]
    assert 0 < len(kept) < 60 and kept == expected[: len(kept)]
    assert isinstance(outputs[-1].error, CheckpointError)


@pytest.mark.parametrize("how", ["truncated", "changed", "replaced"])
def test_a_file_that_fails_while_it_is_streamed_ends_the_pass_with_its_name_and_the_offset(
    tmp_path: Path, how: str
) -> None:
    folder = make_tiny(tmp_path, "LlamaForCausalLM")
    shard = load(folder, least(folder))
    assert len(greedy([shard], PROMPT, 4)) == 4
    path = folder / "model.safetensors"
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "replaced":
        other = tmp_path / "other"
        other.write_bytes(path.read_bytes())
        other.replace(path)
    else:
        with path.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"?")
    with pytest.raises(CheckpointError, match=rf"^{path} .* at byte \d+[^\n]*$"):
        greedy([shard], PROMPT, 8)
