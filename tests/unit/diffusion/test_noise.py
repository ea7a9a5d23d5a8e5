"""Noise is keyed by what it is for."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from b2ray.diffusion.noise import Domain, generator, normal

SHAPE = (4, 8, 8)
KEY = {"seed": 7, "domain": Domain.TRAIN, "stage": 3, "leaves": [(2, 1)], "step": 5}


def draw(**over: object) -> np.ndarray:
    return normal(**{**KEY, **over}, shape=SHAPE)


def test_the_same_key_gives_the_same_bytes_in_any_process():
    code = (
        "import hashlib; from tests.unit.diffusion.test_noise import draw;"
        "print(hashlib.sha256(draw().tobytes()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout != ""
    assert draw().tobytes() == draw().tobytes()


def test_every_part_of_the_key_matters():
    others = [
        {"seed": 8},
        {"seed": 7 + 2**62},
        {"domain": Domain.EVALUATE},
        {"domain": Domain.ORDER},
        {"domain": Domain.EVALUATE, "stage": 2},
        {"stage": 4},
        {"stage": 3 + 256},
        {"leaves": [(3, 1)]},
        {"leaves": [(2, 2)]},
        {"leaves": [(1, 2)]},
        {"step": 6},
        {"step": 1, "leaves": [(2, 5)]},
    ]
    first = draw().ravel()
    likeness = [abs(np.corrcoef(first, draw(**other).ravel())[0, 1]) for other in others]
    assert [other for other, r in zip(others, likeness, strict=True) if not r < 0.3] == []


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**63 - 1),
            st.sampled_from(Domain),
            st.integers(0, 10**6),
            st.integers(0, 10**6),
            st.integers(0, 100),
            st.integers(0, 1000),
        ),
        min_size=2,
        max_size=20,
        unique=True,
    )
)
def test_different_keys_give_different_draws(keys):
    drawn = {normal(s, d, i, [(g, b)], t, (8,)).tobytes() for s, d, i, g, b, t in keys}
    assert len(drawn) == len(keys)


def test_neighbouring_draws_do_not_overlap():
    # A long draw counts on in the counter's lowest word only.
    streams = [generator(0, Domain.TRAIN, 0, step).standard_normal(5000) for step in range(4)]
    for a, b in pairwise(streams):
        assert not set(a) & set(b)


def test_a_row_does_not_depend_on_its_neighbours_or_their_order():
    leaves = [(0, 1), (0, 2), (5, 1), (3, 0)]
    batch = draw(leaves=leaves)
    assert batch.shape == (4, *SHAPE)
    np.testing.assert_array_equal(draw(leaves=leaves[::-1]), batch[::-1])
    for row, leaf in zip(batch, leaves, strict=True):
        np.testing.assert_array_equal(draw(leaves=[leaf])[0], row)


def test_noise_is_standard_normal_in_float32():
    noise = normal(0, Domain.TRAIN, 0, [(g, 1) for g in range(100)], 1, (4, 16, 16))
    assert noise.dtype == np.float32
    n = noise.size
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((noise.astype(float) ** 4).mean() - 3) < 0.1


def test_branches_share_no_noise_with_their_prefix():
    prefix, *branches = draw(leaves=[(2, word) for word in range(4)])
    assert all(abs(np.corrcoef(prefix.ravel(), b.ravel())[0, 1]) < 0.3 for b in branches)
