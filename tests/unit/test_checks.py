"""What is refused before Ray or a model is started."""

from __future__ import annotations

import json

import pytest

from b2ray.checks import PromptSets, check_files, check_model, read_prompts
from b2ray.config import Config, Evaluation, Model, Prompts, Reward
from b2ray.errors import ConfigError


def prompts_of(tmp_path, content: bytes) -> tuple[str, ...]:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    return read_prompts("prompts.train", str(file))


# --- prompts ---------------------------------------------------------------------------------


def test_prompts_are_the_lines(tmp_path):
    assert prompts_of(tmp_path, b"a cat\na dog") == ("a cat", "a dog")


def test_comments_empty_lines_and_blanks_do_not_count(tmp_path):
    assert prompts_of(tmp_path, b"# animals\n\n  a cat \r\n\t\n#a bear\na dog\n") == (
        "a cat",
        "a dog",
    )


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    assert prompts_of(tmp_path, "\ufeffune forêt\n".encode()) == ("une forêt",)


def test_a_prompt_that_stands_twice_is_one(tmp_path):
    assert prompts_of(tmp_path, b"a cat\na dog\na cat\n") == ("a cat", "a dog")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# only a comment\n"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    with pytest.raises(ConfigError, match=r"prompts\.train: .*has no prompts; write one a line"):
        prompts_of(tmp_path, content)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.train: .*cannot be read as UTF-8") as caught:
        prompts_of(tmp_path, "une forêt".encode("latin-1"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere/prompts.txt", ".", ""])
def test_a_missing_file_is_refused_with_its_field(path):
    with pytest.raises(ConfigError, match=r"prompts\.heldout: there is no file .*give a text file"):
        read_prompts("prompts.heldout", path)


def test_an_evaluation_looks_at_the_sets_that_are_there():
    assert PromptSets(("a",), ("b",)).evaluated() == {"train": ("a",), "heldout": ("b",)}
    assert PromptSets(("a",), ()).evaluated() == {"train": ("a",)}


# --- models ----------------------------------------------------------------------------------


def model_folder(tmp_path, index: str | None) -> str:
    if index is not None:
        (tmp_path / "model_index.json").write_text(index)
    return str(tmp_path)


def test_a_pipeline_and_a_hub_id_pass(tmp_path):
    check_model(model_folder(tmp_path, json.dumps({"_class_name": "StableDiffusionPipeline"})))
    check_model("runwayml/stable-diffusion-v1-5")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "no model_index.json; give a folder written by save_pretrained"),
        (
            '{"_class_name": "StableDiffusionXLPipeline"}',
            "is a StableDiffusionXLPipeline: a Stable",
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
    with pytest.raises(ConfigError, match=r"model\.path: there is no folder .*hub id"):
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
    assert len(found.train) == 3
    assert found.heldout == ()


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
