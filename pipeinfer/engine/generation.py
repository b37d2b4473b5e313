"""What a model's generation_config.json says of sampling, as transformers' ``generate`` would take it.

Without ``do_sample: true`` decoding is greedy and only the repetition penalty counts. With it, absent keys have
transformers' defaults, top_k 50 among them. A model without that file is decoded greedily.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import CheckpointError, UserError
from pipeinfer.core.ports import GREEDY, Sampling
from pipeinfer.core.sampling import exact
from stages.checkpoint.folder import has_file, is_gguf_name, model_folder, printable, read_object, refuse, shown

FILE = "generation_config.json"
DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers', where tokens are drawn
MOST = 1e30  # larger than any value that a check by name could accept

# Options that change tokens and that there are none of here, with the values that change nothing.
_GREEDY_ONLY: dict[str, tuple[object, ...]] = {"penalty_alpha": (0,)}
_DRAWN_ONLY: dict[str, tuple[object, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
_ALWAYS: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "dola_layers": (),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "token_healing": (False,),
    "watermarking_config": (),
    "stop_strings": ([],),
}


@dataclass(frozen=True, slots=True)
class Generation:
    """How a model wants its tokens drawn, and the ``ignored`` options by name, which would change them, too."""

    sampling: Sampling = GREEDY
    ignored: tuple[str, ...] = ()


def model_sampling(directory: str | Path) -> Generation:
    """Read generation_config.json in ``directory``. Raises CheckpointError for a file that is damaged or that asks for
    what cannot be meant. A GGUF file has none."""
    if is_gguf_name(directory):
        return Generation()
    path = model_folder(directory) / FILE
    if not has_file(path):
        return Generation()
    fields = {name: value for name, value in read_object(path).items() if value is not None}
    draws = fields.get("do_sample", False)
    if type(draws) is not bool:
        refuse(f"{path}: do_sample must be true or false, not {shown(draws)}", "correct it")
    sampling = replace(GREEDY, repetition_penalty=_number(path, fields, "repetition_penalty", 1.0))
    if draws:
        sampling = replace(sampling, **{name: _number(path, fields, name, value) for name, value in DEFAULTS.items()})
    known = _ALWAYS | (_DRAWN_ONLY if draws else _GREEDY_ONLY)
    ignored = [name for name, neutral in known.items() if name in fields and fields[name] not in neutral]
    return Generation(exact(sampling), tuple(ignored))


def _number(path: Path, fields: dict[str, Any], name: str, default: float) -> Any:
    """One setting, checked as if a user had asked for it."""
    value = fields.get(name, default)
    kinds = (int,) if type(default) is int else (int, float)
    if type(value) not in kinds or not -MOST < value < MOST:
        refuse(f"{path}: {name} must be a number, not {shown(value)}", "correct it")
    try:
        exact(replace(GREEDY, **{name: value}))
    except UserError as error:
        raise CheckpointError(f"{printable(str(path), 300)}: {error}") from None
    return value
