from __future__ import annotations

import time

import numpy as np
import pytest

from b2ray.shapes import Caption, Judge, all_captions, render, render_batch
from b2ray.shapes.captions import COLOURS, SHAPES, Thing, near_misses
from b2ray.shapes.render import Placed, draw, place


@pytest.fixture(scope="module")
def world():
    """400 captions and a picture of each."""
    captions = all_captions()
    picked = np.random.default_rng(11).integers(len(captions), size=400)
    chosen = [captions[i] for i in picked]
    return chosen, render_batch(chosen, seed=11)


def test_it_accepts_drawn_pictures(world):
    captions, pictures = world
    scores = Judge().score(pictures, [caption.text for caption in captions])
    assert scores.dtype == np.float32 and scores.shape == (400,)
    assert set(np.unique(scores)) <= {0.0, 1.0}
    assert scores.mean() >= 0.98


def test_it_accepts_the_mirrored_caption():
    picture = render(Caption.parse("a red circle above a blue square"), 0)[None]
    assert Judge().score(picture, ["a blue square below a red circle"]) == 1.0


@pytest.mark.parametrize("kind", range(5), ids=["colours", "shapes", "relation", "colour", "shape"])
def test_it_rejects_every_kind_of_near_miss(world, kind):
    captions, pictures = world
    rng = np.random.default_rng(kind)
    wrong = [near_misses(caption, rng)[kind].text for caption in captions]
    assert Judge().score(pictures, wrong).mean() <= 0.005


def test_it_sees_every_object():
    rng = np.random.default_rng(5)
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    assert len(things) == 30
    pictures = np.stack([draw([Placed(thing, 15.3, 16.1, 5.0)], rng) for thing in things])
    sights = Judge().see(pictures)
    assert [seen and [s.thing for s in seen] for seen in sights] == [[thing] for thing in things]
    for (seen,) in sights:
        assert abs(seen.x - 15) < 1 and abs(seen.y - 16) < 1 and seen.overlap > 0.8, seen


def test_it_rejects_a_missing_object_and_a_third_one():
    rng = np.random.default_rng(0)
    caption = Caption.parse("a red circle left of a green cross")
    first, second = place(caption, rng)
    third = Placed(Thing("blue", "square"), 16.0, 27.0, 4.0)
    pictures = np.stack(
        [draw([first], rng), draw([second], rng), draw([first, second, third], rng)]
    )
    assert Judge().score(pictures, [caption.text] * 3).tolist() == [0.0, 0.0, 0.0]


def test_it_rejects_blank_grey_and_noisy_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    plain = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (0, 128, 240, 255)])
    prompts = ["a red circle left of a green cross"] * 8
    assert Judge().score(np.concatenate([noise, plain]), prompts).sum() == 0


def test_it_bears_a_little_noise(world):
    captions, pictures = world
    noise = np.random.default_rng(0).normal(0, 6, pictures.shape)
    noisy = np.clip(pictures + noise, 0, 255).astype(np.uint8)
    assert Judge().score(noisy, [caption.text for caption in captions]).mean() >= 0.95


def test_512_pictures_take_less_than_two_seconds(world):
    captions, pictures = world
    pictures = np.concatenate([pictures, pictures[:112]])
    texts = [caption.text for caption in [*captions, *captions[:112]]]
    started = time.process_time()
    Judge().score(pictures, texts)
    assert time.process_time() - started < 2


def test_an_empty_batch_has_no_scores():
    assert Judge().score(np.empty((0, 32, 32, 3), np.uint8), []).shape == (0,)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), 1, "reads uint8 pictures"),
        (np.zeros((1, 64, 64, 3), np.uint8), 1, "reads uint8 pictures"),
        (np.zeros((1, 3, 32, 32), np.uint8), 1, "reads uint8 pictures"),
        (np.zeros((32, 32, 3), np.uint8), 1, "reads uint8 pictures"),
        (np.zeros((2, 32, 32, 3), np.uint8), 1, "2 pictures but 1 prompts"),
    ],
)
def test_wrong_pictures_are_refused(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        Judge().score(images, ["a red circle above a blue square"] * prompts)


def test_a_prompt_of_another_world_is_refused():
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        Judge().score(np.zeros((1, 32, 32, 3), np.uint8), ["a photo of a cat"])
