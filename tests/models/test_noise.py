"""The noise of sampling: fixed for ever, made of Philox, and Gumbel's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from stages.kernels.sampling import noise

# Tokens 0 to 4 and 1002, for some seeds and positions. These numbers decide every sampled text, for ever.
GOLDEN = {
    (0, 0): [-1.49545161157695, -0.3511371183614868, -0.7859067841514997, 0.5586754626449686, 0.3733862877981871,
             -0.05259229670267841],
    (0, 1): [-0.4394360086828338, -0.4282578804306737, 1.2735127182046522, 0.46475426029220757, 1.4171651651406563,
             -0.45856930152062264],
    (1, 0): [-0.17575800360186283, 1.8076498398198788, -0.6189814975417195, -1.2442527174409201, 2.253201972288481,
             0.5320784731464008],
    (2**64 - 1, 4095): [0.8628794755325787, 2.7443102773140953, -0.14998352702636472, -0.6168522560626822,
                        3.969991991776007, 2.563628450828431],
}  # fmt: skip


@pytest.mark.parametrize(("seed", "position"), GOLDEN)
def test_the_noise_never_changes(seed: int, position: int) -> None:
    found = noise(seed, position, 1003)[[0, 1, 2, 3, 4, 1002]].tolist()
    assert found == pytest.approx(GOLDEN[seed, position], rel=1e-12)


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """One block of Philox4x64-10 (Salmon and others, SC'11), written down once more."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (q >> 64) ^ b ^ k, q % 2**64, (p >> 64) ^ d ^ m, p % 2**64
        k, m = (k + 0x9E3779B97F4A7C15) % 2**64, (m + 0xBB67AE8584CAA73B) % 2**64
    return [a, b, c, d]


def test_the_noise_is_made_of_philox() -> None:
    assert philox((0, 0, 0, 0), (0, 0)) == [  # the authors' own test vector
        0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B
    ]  # fmt: skip
    for seed, position in ((0, 0), (123, 456), (2**64 - 1, 2**31)):
        words = [word for block in range(1, 26) for word in philox((block, position, 0, 0), (seed, 0))]
        wanted = [-math.log(-math.log(((word >> 12) + 0.5) / 2**52)) for word in words]
        assert noise(seed, position, 100).tolist() == pytest.approx(wanted, rel=1e-12)


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    assert torch.equal(noise(5, 7, 100), noise(5, 7, 1000)[:100])
    heads = {tuple(noise(seed, position, 4).tolist()) for seed in (0, 1, 2**64 - 1) for position in (0, 1, 2**20)}
    assert len(heads) == 9


def test_noise_is_gumbel_s() -> None:
    """Against exp(-exp(-x)), by the distance of Kolmogorov and Smirnov."""
    count = 200_000
    found = noise(11, 12, count).sort().values
    assert found.isfinite().all()
    distance = (torch.exp(-torch.exp(-found)) - torch.arange(count) / count).abs().max()
    assert distance * count**0.5 < 1.63  # exceeded by one sample in a hundred
