"""The built-in prompt sets: how many there are, some by hand, and what the test sets hold out."""

from __future__ import annotations

from collections import Counter

import pytest

from b2ray.prompts import read
from b2ray.prompts.templates import ACTIVITIES, ANIMALS, BUILT_IN

EXAMPLES = {
    "template1.train": (45, "a cat washing dishes", "an ant riding a bike", "a fly playing chess"),
    "template1.test": (90, "a cat riding a bike", "a cat playing chess", "an ant washing dishes"),
    "template2.train": (40, "red apple", "purple grape", "pink pomegranate", "red grapefruit"),
    "template2.test": (40, "yellow apple", "white strawberry", "green corn", "yellow bell pepper"),
    "template3.train": (40, "chair under umbrella", "dog on the right of vase", "glasses on face"),
    "template3.test": (30, "trash can in the front of cabinet", "trees behind grass"),
    "animals": (45, "a cat", "an ant", "a kangaroo"),
    "animals_activities": (135, "a bear playing chess", "an ant playing chess"),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_set(name):
    count, *examples = EXAMPLES[name]
    found = read("prompts.train", name)
    assert len(found.texts) == len(set(found.texts)) == count
    assert set(examples) <= set(found.texts)
    assert set(found.weights) == {1.0}
    assert all(text == " ".join(text.split()) for text in found.texts)


@pytest.mark.parametrize("name", ["template1", "template2", "template3"])
def test_nothing_of_a_test_set_is_trained_on(name):
    train, test = (read("f", f"{name}.{which}").texts for which in ("train", "test"))
    assert not set(train) & set(test)


def test_template_1_has_fifteen_animals_an_activity():
    train, test = read("f", "template1.train").texts, read("f", "template1.test").texts
    for activity in ACTIVITIES:
        assert sum(text.endswith(activity) for text in train) == 15
        assert sum(text.endswith(activity) for text in test) == 30
    assert train[14:16] == ("a bear washing dishes", "a raccoon riding a bike")
    assert train[29:31] == ("a snake riding a bike", "a turtle playing chess")
    assert {*train, *test} == set(read("f", "animals_activities").texts)


def test_an_stands_before_vowels_alone():
    assert len(set(ANIMALS)) == 45
    assert [text for text in read("f", "animals").texts if text.startswith("an ")] == ["an ant"]


def test_template_2_tests_every_fruit_in_a_colour_of_its_own():
    train, test = read("f", "template2.train").texts, read("f", "template2.test").texts
    fruit = Counter(text.split(" ", 1)[1] for text in train)
    assert set(fruit.values()) == {2} and len(fruit) == 20
    foods = [text.split(" ", 1)[1] for text in test]
    assert set(fruit) == set(foods[:20]) and len(set(foods)) == 40


def test_template_3_tests_two_unseen_predicates():
    def predicates(name: str) -> Counter[str]:
        longest_first = ("on the left of", "on the right of", "in the front of", "behind", "under")
        return Counter(
            next((p for p in longest_first if f" {p} " in text), "on")
            for text in read("f", name).texts
        )

    train, test = predicates("template3.train"), predicates("template3.test")
    assert set(train.values()) == {10} and set(test.values()) == {5}
    assert set(test) - set(train) == {"behind", "in the front of"}
