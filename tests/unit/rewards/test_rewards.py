"""The registry, the checks of what rewards answer, and CLIP against transformers' own."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from b2ray.config import Reward
from b2ray.errors import ConfigError
from b2ray.rewards import BUILT_IN, Panel, check, checked, load, refuse_constant
from b2ray.rewards.clip import Clip
from tests.models import PROMPTS

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


class Brightness:
    """A user's reward."""

    def score(self, images, prompts):
        return images.mean((1, 2, 3)) / 255


class Short:
    def score(self, images, prompts):
        return np.ones(len(prompts) - 1, np.float32)


class Column:
    def score(self, images, prompts):
        return np.ones((len(prompts), 1), np.float32)


class Undefined:
    def score(self, images, prompts):
        return np.array([0.5, np.nan, np.inf], np.float32)


class Words:
    def score(self, images, prompts):
        return ["good"] * len(prompts)


class NoReward:
    pass


def mine(kind: type, name: str = "mine") -> Reward:
    return Reward(name=name, kind=f"{__name__}:{kind.__name__}")


def panel_scores(*kinds: type) -> dict[str, np.ndarray]:
    names = [f"mine{i}" for i in range(len(kinds))]
    panel = Panel([mine(k, n) for k, n in zip(kinds, names, strict=True)], CPU)
    return panel.score(IMAGES, PROMPTS, names)


# --- answers ---------------------------------------------------------------------------------


def test_scores_are_float32_by_name():
    (scores,) = panel_scores(Brightness).values()
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, IMAGES.mean((1, 2, 3)) / 255, rtol=1e-6)


def test_only_the_rewards_that_are_asked_for_score():
    panel = Panel([mine(Brightness, "a"), mine(Short, "b")], CPU)
    assert list(panel.score(IMAGES, PROMPTS, ["a"])) == ["a"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Short, r"'mine1' returned scores of shape \(2,\) for 3 pictures"),
        (Column, r"'mine1' returned scores of shape \(3, 1\) for 3 pictures"),
        (Undefined, rf"'mine1' returned nan for the prompt '{PROMPTS[1]}' \(2 of 3"),
        (Words, "'mine1'"),
    ],
)
def test_a_wrong_answer_names_the_reward(kind, words):
    with pytest.raises(ValueError, match=words):
        panel_scores(Brightness, kind)


def test_no_pictures_no_scores():
    assert checked("mine", [], []).shape == (0,)


def test_a_constant_reward_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'mine' returned 0\.5 for all 6 pictures"):
        refuse_constant("mine", np.full((2, 3), 0.5))
    refuse_constant("mine", np.array([[0.5, 0.5], [0.5, 0.6]]))
    refuse_constant("mine", np.array([[0.5]]))


# --- the registry ----------------------------------------------------------------------------


def test_built_in_kinds_are_known():
    assert len(BUILT_IN) > 5
    for kind in BUILT_IN:
        options = {"url": "http://127.0.0.1/"} if kind == "http" else {}
        check(Reward(name="r", kind=kind, options=options))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("clipp", r"'mine' has kind 'clipp': use aesthetic, .*module:name"),
        ("my.module", "module:name"),
        ("no_such_module_here:Reward", "no module 'no_such_module_here'"),
        ("b2ray.nothing:Reward", "no module 'b2ray.nothing'"),
        ("no.parent.here:Reward", "no module 'no.parent.here'"),
        (":Reward", "no module ''"),
    ],
)
def test_a_kind_that_is_not_there_is_refused_before_anything_starts(kind, words):
    with pytest.raises(ConfigError, match=words):
        check(Reward(name="mine", kind=kind))


def test_checking_does_not_import_a_heavy_module(tmp_path, monkeypatch):
    (tmp_path / "heavy_reward.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    check(Reward(name="mine", kind="heavy_reward:Reward"))
    assert "heavy_reward" not in sys.modules


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (f"{__name__}:Missing", "'mine' .*cannot be imported.*Missing"),
        (
            f"{__name__}:NoReward",
            r"'mine': .*NoReward is neither a function",
        ),
    ],
)
def test_a_class_that_is_no_reward_is_refused(kind, words):
    with pytest.raises(ConfigError, match=words):
        load(Reward(name="mine", kind=kind), CPU)


# --- CLIP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(models) -> Clip:
    return load(Reward(name="clip", kind="clip", path=str(models / "reward")), CPU)


def transformers_own(models, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    model = CLIPModel.from_pretrained(models / "reward")
    processor = CLIPProcessor.from_pretrained(models / "reward")
    inputs = processor(
        text=prompts,
        images=[Image.fromarray(i) for i in images],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    return logits.diagonal().numpy()


def test_clip_is_transformers_own_at_the_models_size(clip, models):
    found = clip.score(IMAGES, PROMPTS)
    np.testing.assert_allclose(found, transformers_own(models, IMAGES, PROMPTS), atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 48), (40, 64)])
def test_clip_is_transformers_own_at_another_size(clip, models, shape):
    # Resizing may differ from Pillow's by one of 255 levels; in the cosine that is below 0.005.
    images = np.random.default_rng(1).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        clip.score(images, PROMPTS), transformers_own(models, images, PROMPTS), atol=5e-3
    )


def test_clips_embeddings_are_unit_vectors(clip):
    vectors = clip.embed(IMAGES)
    assert (vectors.dtype, vectors.shape) == (np.float32, (3, 16))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_a_score_belongs_to_its_own_picture_and_prompt(clip):  # defect 13
    together = clip.score(IMAGES, PROMPTS)
    alone = [clip.score(IMAGES[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    swapped = clip.score(IMAGES[::-1], PROMPTS[::-1])
    np.testing.assert_allclose(swapped, together[::-1], atol=1e-6)


def test_the_same_pictures_score_the_same_in_evaluation_mode(clip):  # defect 13
    assert not any(m.training for m in clip.model.modules())
    np.testing.assert_array_equal(clip.score(IMAGES, PROMPTS), clip.score(IMAGES, PROMPTS))


def test_a_panel_embeds_with_the_first_reward_that_can(models):
    spec = Reward(name="clip", kind="clip", path=str(models / "reward"))
    panel = Panel([mine(Brightness), spec], CPU)
    assert panel.embed(IMAGES).shape == (3, 16)
    assert Panel([mine(Brightness)], CPU).embed(IMAGES) is None


def test_a_clip_that_does_not_load_is_a_sentence(models):
    with pytest.raises(ConfigError, match=r"reward 'clip': .*cannot be loaded as a CLIPModel"):
        load(Reward(name="clip", kind="clip", path=str(models / "base")), CPU)
