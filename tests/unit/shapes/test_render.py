from __future__ import annotations

import numpy as np

from b2ray.shapes import Caption, all_captions, render, render_batch

CAPTION = Caption.parse("a red circle above a blue square")


def test_a_picture_is_a_function_of_caption_and_seed():
    first = render(CAPTION, 3)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, render(CAPTION, 3))
    assert not np.array_equal(first, render(CAPTION, 4))


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch():
    captions = all_captions()[:5]
    whole = render_batch(captions, seed=9)
    assert whole.shape == (5, 32, 32, 3)
    assert np.array_equal(whole[:2], render_batch(captions[:2], seed=9))
    assert np.array_equal(whole[3], render(captions[3], (9, 3)))


def test_mirrored_captions_draw_the_same_picture():
    mirrored = Caption.parse("a blue square below a red circle")
    assert np.array_equal(render(CAPTION, 1), render(mirrored, 1))


def test_edges_are_smooth():
    levels = np.unique(render(CAPTION, 0)[..., 1])
    assert len(levels) > 8
