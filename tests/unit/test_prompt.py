"""Token ids in every form in which libraries hand them over, and what is none."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch

from pipeinfer.core.errors import UserError
from pipeinfer.engine.prompt import token_ids

IDS = [5, 0, 99]


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        tuple(IDS),
        iter(IDS),
        range(5, 6),
        np.array(IDS),
        list(np.array(IDS, np.int32)),
        np.array([IDS]),
        torch.tensor(IDS),
        torch.tensor([IDS]),
        [torch.tensor(5), torch.tensor(0)],
        {"input_ids": IDS, "attention_mask": [1, 1, 1]},
        UserDict({"input_ids": torch.tensor([IDS])}),
        [],
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_libraries_hand_over_is_served(given: Any) -> None:
    found = token_ids(given, 100)
    assert all(type(token) is int for token in found)
    assert found in (IDS, IDS[:2], IDS[:1], [])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"hello", "bytes"),
        ([1.5], "not token ids"),
        (np.array([1.0]), "not token ids"),
        (7, "not token ids"),
        (None, "not token ids"),
        (["a"], "not token ids"),
        ([[1], [2]], "2 prompts at once"),
        (np.array([[1], [2]]), "2 prompts at once"),
        ({"tokens": IDS}, "without input_ids"),
        ([100], "token 100 .* the target knows 0 to 99"),
        ([-1], "token -1"),
        ([2**70], "token"),
    ],
    ids=repr,
)
def test_what_is_none_is_refused_in_one_line(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        token_ids(given, 100)
    assert "\n" not in str(refused.value)
