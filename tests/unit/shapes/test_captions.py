from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from b2ray.shapes import PROMPTS, Caption, Thing, all_captions
from b2ray.shapes.captions import COLOURS, RELATIONS, SHAPES, choose, near_misses


def test_every_caption_is_read_back_from_its_text():
    captions = all_captions()
    assert len(captions) == len(set(captions)) == 30 * 29 * 4
    assert all(Caption.parse(caption.text) == caption for caption in captions)


def test_the_text_reads_as_english():
    caption = Caption(Thing("red", "circle"), "left of", Thing("blue", "square"))
    assert caption.text == "a red circle left of a blue square"


def test_case_and_spacing_do_not_matter():
    assert Caption.parse("  A red  circle above a Blue square ").relation == "above"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a red circle",
        "red circle above blue square",
        "a pink circle above a blue square",
        "a red star above a blue square",
        "a red circle beside a blue square",
        "a red circle above a red circle",
        "a red circle above a blue square above a black cross",
    ],
)
def test_anything_else_is_refused_in_one_sentence(text):
    with pytest.raises(ValueError, match=r"is not a caption of the shapes world.*\.$"):
        Caption.parse(text)


def test_mirrored_captions_tell_one_scene():
    above = Caption.parse("a red circle above a blue square")
    below = Caption.parse("a blue square below a red circle")
    assert above.scene == below.scene != Caption.parse("a red circle below a blue square").scene
    assert len({caption.scene for caption in all_captions()}) == 1740


def test_near_misses_tell_other_scenes_and_differ_from_each_other():
    rng = np.random.default_rng(0)
    for caption in all_captions()[::7]:
        wrong = near_misses(caption, rng)
        assert len(set(wrong)) == 5
        assert all(w.scene != caption.scene and w.first != w.second for w in wrong)


def test_a_choice_is_balanced_repeatable_and_keeps_out_what_it_should():
    few = choose(8, seed=1)
    many = choose(60, seed=2, exclude=few)
    assert many == choose(60, seed=2, exclude=few) != choose(60, seed=3, exclude=few)
    assert not {c.scene for c in few} & {c.scene for c in many}
    things = [thing for caption in many for thing in (caption.first, caption.second)]
    assert set(Counter(t.colour for t in things).values()) == {120 // len(COLOURS)}
    assert set(Counter(t.shape for t in things).values()) == {120 // len(SHAPES)}
    assert set(Counter(c.relation for c in many).values()) == {60 // len(RELATIONS)}


def test_prompt_files_hold_apart_and_share_all_attributes():
    files = {
        name: [Caption.parse(line) for line in (PROMPTS / name).read_text().splitlines()]
        for name in ("train.txt", "train32.txt", "heldout.txt")
    }
    assert [len(captions) for captions in files.values()] == [8, 32, 64]
    assert set(files["train.txt"]) <= set(files["train32.txt"])
    seen = {caption.scene for caption in files["train32.txt"]}
    assert not seen & {caption.scene for caption in files["heldout.txt"]}
    for captions in files.values():
        things = [thing for caption in captions for thing in (caption.first, caption.second)]
        assert {t.colour for t in things} == set(COLOURS)
        assert {t.shape for t in things} == set(SHAPES)
        assert {c.relation for c in captions} == set(RELATIONS)
