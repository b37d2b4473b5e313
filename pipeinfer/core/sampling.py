"""What may be asked of sampling, checked and put into the form in which every rank has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeinfer.core.errors import refuse
from pipeinfer.core.ports import Sampling

LEAST, MOST = float(np.float32(1e-5)), 1e5
"""Bounds of temperature and penalty; within them no score leaves the range of 32-bit numbers."""
MOST_STOPS = 16
"""Stop strings of one request."""


def exact(sampling: Sampling) -> Sampling:
    """``sampling`` with its numbers rounded to the 32 bits in which they travel, so that a rank that was sent them
    computes what one that was given them does. Raises UserError for numbers that nobody can mean."""
    given = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        temperature, top_p, min_p, penalty = np.array(given, np.float32).tolist()
    bounds = f"a number from {LEAST:g} to {MOST:g}"
    if not (temperature == 0 or LEAST <= temperature <= MOST):
        refuse(f"temperature {sampling.temperature:g}", f"use 0 (greedy) or {bounds}")
    if not 0 <= sampling.top_k < 2**31:
        refuse(f"top_k {sampling.top_k}", "use 0 (all tokens) or the number of tokens to draw from")
    if not 0 < top_p <= 1:
        refuse(f"top_p {sampling.top_p:g}", "use a number above 0, up to 1 (all tokens)")
    if not 0 <= min_p <= 1:
        refuse(f"min_p {sampling.min_p:g}", "use a number from 0 (all tokens) to 1")
    if not LEAST <= penalty <= MOST:
        refuse(f"repetition_penalty {sampling.repetition_penalty:g}", f"use 1 (none) or {bounds}")
    if not 0 <= sampling.seed < 2**64:
        refuse(f"seed {sampling.seed}", "use a whole number from 0 to 2^64 - 1")
    return Sampling(temperature, int(sampling.top_k), top_p, min_p, penalty, int(sampling.seed))


def checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The strings that end an answer. Raises UserError where they cannot."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MOST_STOPS:
        refuse(f"{len(stops)} stop strings", f"use at most {MOST_STOPS}")
    for text in stops:
        if not text:
            refuse("an empty stop string", "leave it out, or give the text to stop at")
        try:
            text.encode()
        except UnicodeEncodeError:
            refuse(f"the stop string {text!r} is not UTF-8 text", "convert it, for instance with iconv")
    return stops
