"""`b2ray check --variance`: the analysis of variance, the advice and the picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from b2ray.commands.variance import ENOUGH, Spread, advice, picture, spread, weights
from b2ray.errors import ConfigError


def simulated(within: float, prefix: float, seed: int = 0) -> np.ndarray:
    """Rewards of 40 prompts, 6 prefixes and 5 branches with these standard deviations."""
    chance = np.random.default_rng(seed)
    of_prompts = chance.normal(0, 7, (40, 1, 1))
    of_prefixes = prefix * chance.normal(size=(40, 6, 1))
    return of_prompts + of_prefixes + within * chance.normal(size=(40, 6, 5))


@pytest.mark.parametrize(("within", "prefix"), [(1.0, 1.0), (0.2, 2.0), (1.0, 0.0)])
def test_the_parts_are_told_apart_whatever_prompts_differ_by(within, prefix):
    found = spread(3, simulated(within, prefix))
    assert found.within == pytest.approx(within**2, rel=0.15)
    assert found.prefix == pytest.approx(prefix**2, rel=0.25, abs=0.05)
    share = within**2 / (within**2 + prefix**2)
    assert found.low - 0.02 <= share <= found.high + 0.02
    assert found.low <= found.share <= found.high


def test_rewards_that_are_all_the_same_have_no_spread():
    assert spread(3, np.ones((2, 3, 4))).share == 0


def shares(*values: float) -> list[Spread]:
    return [Spread(n, v, 1 - v, v, v) for n, v in enumerate(values, 1)]


def test_the_advice_is_the_shortest_interval_that_has_something_to_learn():
    assert "start the interval at 3 of 20" in advice(shares(0.1, 0.2, ENOUGH, 0.9), 20)
    assert "--preset=ddpo" in advice(shares(0.1, 0.2), 20)


def test_weights_are_roots_of_what_each_step_adds_first_step_first():
    # 0.25, 0.5, nothing (less than before is chance), 0.25.
    found = [Spread(n, v, 0, 0, 0) for n, v in ((1, 0.25), (2, 0.75), (3, 0.7), (4, 1.0))]
    assert weights(found, 4) == [0.71, 0.0, 1.0, 0.71]


def test_lengths_that_were_not_tried_share_alike():
    assert weights([Spread(2, 0.5, 0, 0, 0), Spread(4, 2.5, 0, 0, 0)], 4) == [1, 1, 0.5, 0.5]
    assert weights([Spread(2, 0.0, 0, 0, 0), Spread(3, 0.0, 0, 0, 0)], 3) == [1, 1, 1]


def test_the_picture_is_a_png(tmp_path):
    file = tmp_path / "variance.png"
    picture(shares(0.1, 0.5, 0.9), file)
    with Image.open(file) as found:
        assert found.format == "PNG" and found.width > 500


def test_a_picture_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        picture(shares(0.1, 0.5), tmp_path / "none" / "variance.png")
