"""What is refused before Ray or a model is started."""

from __future__ import annotations

import json

import pytest

from b2ray.config import Config, Evaluation, Model, Prompts, Reward
from b2ray.config.load import parse
from b2ray.errors import ConfigError
from b2ray.preflight import check_files, check_model

# --- models ----------------------------------------------------------------------------------


def model_folder(tmp_path, index: str | None) -> str:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    return str(tmp_path)


def test_a_pipeline_and_a_hub_id_pass(tmp_path):
    check_model(model_folder(tmp_path, json.dumps({"_class_name": "StableDiffusionPipeline"})))
    check_model(model_folder(tmp_path, json.dumps({"_class_name": "StableDiffusionXLPipeline"})))
    check_model("runwayml/stable-diffusion-v1-5")


def test_a_single_file_must_be_safetensors(tmp_path):
    for name in ("model.safetensors", "model.ckpt"):
        (tmp_path / name).write_bytes(b"")
    check_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(ConfigError, match=r"must be \.safetensors; pickled"):
        check_model(str(tmp_path / "model.ckpt"))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "no model_index.json; give a folder written by save_pretrained"),
        (
            '{"_class_name": "FluxPipeline"}',
            "is a FluxPipeline: StableDiffusionPipeline or StableDiffusionXLPipeline is needed",
        ),
        ("{}", "is a None"),
        ("[1]", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_a_folder_that_is_no_pipeline_is_refused(tmp_path, index, words):
    with pytest.raises(ConfigError, match=rf"model\.path.*{words}"):
        check_model(model_folder(tmp_path, index))


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "one/two/three", "model"])
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path):
    with pytest.raises(ConfigError, match=r"model\.path: there is no file or folder .*hub id"):
        check_model(path)


# --- all of a configuration's files ----------------------------------------------------------


def config(models, **over: object) -> Config:
    values = {
        "model": Model(path=str(models / "base")),
        "prompts": Prompts(train=str(models / "prompts.txt")),
        "rewards": (Reward(name="clip", kind="clip", path=str(models / "reward")),),
    }
    return Config(**{**values, **over})


def test_good_files_give_the_prompts(models):
    found = check_files(config(models))
    assert len(found.train.texts) == 3
    assert found.heldout is None
    both = Prompts(train="template1.train", heldout="template1.test")
    found = check_files(config(models, prompts=both))
    assert {name: len(texts) for name, texts in found.evaluated().items()} == {
        "train": 45,
        "heldout": 90,
    }


def test_a_missing_reward_model_names_the_reward(models):
    missing = Reward(name="second", kind="clip", path="/no/such/reward")
    for over in (
        {"rewards": (missing,)},
        {"evaluation": Evaluation(heldout_rewards=(missing,))},
    ):
        with pytest.raises(ConfigError, match="reward 'second': there is no folder"):
            check_files(config(models, **over))


def test_a_missing_heldout_file_names_its_field(models):
    prompts = Prompts(train=str(models / "prompts.txt"), heldout="/no/such.txt")
    with pytest.raises(ConfigError, match=r"prompts\.heldout"):
        check_files(config(models, prompts=prompts))


# --- the interval ----------------------------------------------------------------------------


def test_an_interval_that_goes_by_a_share_that_nobody_can_measure_is_refused():
    """The quickstart has eight captions and eight groups."""
    words = ["--curriculum.extend=spread", "--curriculum.start=7", "--advantage.window=0"]
    with pytest.raises(ConfigError, match=r"advantage\.window is 0: raise advantage\.window or "):
        check_files(parse(words).config)
    for more in ("--advantage.window=1", "--branching.images=72", "--curriculum.extend=calendar"):
        check_files(parse([*words, more]).config)
