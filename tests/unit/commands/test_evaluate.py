"""`b2ray evaluate` before any actor starts: what is compared, in which setting, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from b2ray.commands.candidates import candidates
from b2ray.commands.evaluate import _hacking, _table, main, make_parser
from b2ray.errors import EXIT_CONFIG, ConfigError
from b2ray.evaluation.evaluate import Evaluation
from tests.models import PROMPTS


@pytest.fixture
def find(runs):
    return lambda *words: candidates(make_parser().parse_args([*words, f"--runs={runs}"]))


def test_a_run_is_beside_its_base_model(find, runs):
    (base, done), setting = find("done")
    assert (base.name, base.weights, done.name) == ("base model", None, "done")
    assert base.model == done.model
    assert setting.sets == {"train": tuple(PROMPTS), "heldout": tuple(PROMPTS)}
    assert setting.units == {"train": "picture", "heldout": "prompt"}
    assert (setting.count, setting.config.seed, setting.notes) == (6, 0, ())


def test_two_runs_are_beside_each_other_in_the_firsts_setting(find):
    given, setting = find("going", "done", "--stage=1", "--seed=4", "--images=9", "--steps=7")
    assert [c.name for c in given] == ["going, stage 1 of 3", "done"]
    assert (setting.config.seed, setting.count, setting.config.sampling.steps) == (4, 9, 7)
    assert len(setting.notes) == 2 and "(steps: 4, here 7)" in setting.notes[0]


def test_fields_go_over_every_run(find):
    given, setting = find("going", "done", "--model.offload=true", "--fleet.samplers.max=7")
    assert all(c.model.offload for c in given)
    assert setting.config.fleet.samplers.max == 7


def test_a_configuration_takes_the_place_of_the_runs(find, runs, tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text((runs / "done" / "config.yaml").read_text().replace("seed: 0", "seed: 8"))
    (_, done), setting = find("done", f"--config={file}")
    assert (done.name, setting.config.seed) == ("done", 8)


def test_a_base_model_is_alone(find, runs):
    given, _ = find(f"--config={runs / 'done' / 'config.yaml'}")
    assert [(c.name, c.weights) for c in given] == [("base model", None)]


def test_a_lora_has_the_adapter_that_fits_it(find, runs):
    (base, given), _ = find(f"--config={runs / 'done' / 'config.yaml'}", f"--lora={runs}/done/lora")
    assert base.model == given.model
    assert (given.name, given.model.lora.rank, given.model.lora.alpha) == ("lora", 2, 3.0)


def test_other_prompts_and_rewards_are_taken_as_they_are(find, tmp_path):
    for name in ("train.txt", "b.txt"):
        (tmp_path / name).write_text("a red circle\n")
    rewards = '[{"name": "size", "kind": "jpeg_incompressibility"}]'
    words = (f"--prompts={tmp_path / 'train.txt'}", f"--prompts={tmp_path / 'b.txt'}")
    _, setting = find("done", *words, "--prompts=animals", f"--rewards={rewards}")
    assert list(setting.sets) == ["train", "b", "animals"]
    assert set(setting.units.values()) == {"prompt"}
    assert setting.config.rewards == ()
    assert [r.name for r in setting.config.all_rewards] == ["size"]
    _, setting = find("done", "--unit=picture")
    assert set(setting.units.values()) == {"picture"}


def test_two_of_one_name_are_told_apart(find, runs, tmp_path):
    (tmp_path / "done").symlink_to(runs / "done")
    given, _ = find("done", str(tmp_path / "done"))
    assert [c.name for c in given] == [f"done ({runs / 'done'})", f"done ({tmp_path / 'done'})"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("none",), "there is no run 'none'"),
        (("begun",), "has no committed stage yet"),
        (("done", "done"), "'done' is given twice"),
        (("done", "going", "--lora=x.safetensors"), "compare two at a time"),
        (("done", "--lora=x.safetensors"), "there is no LoRA 'x.safetensors'"),
        (("done", "--images=0"), "--images: '0' is no whole number of at least 1"),
        (("done", "--steps=1"), "--steps is 1: input should be greater"),
        (("done", "--prompts=none.txt"), "--prompts: there is no file 'none.txt'"),
        (("done", "--prompts=animals", "--prompts=animals"), "two sets are called 'animals'"),
        (("done", "--rewards=clip"), "--rewards: "),
        (("done", '--rewards=[{"name": "a", "kind": "none"}]'), "reward 'a' has kind 'none'"),
        (("done", '--rewards=[{"name": "seed", "kind": "clip"}]'), "word of the summary"),
        (("done", "--rewards=[]"), "there is nothing to measure"),
        (("done", "--unit=seed"), "invalid choice: 'seed'"),
        (("done", "--sampling.step=3"), "sampling.step"),
        (("done", "--nothing"), "nothing"),
    ],
)
def test_wrong_input_is_one_sentence(runs, capsys, words, sentence):
    assert main([*words, f"--runs={runs}"]) == EXIT_CONFIG
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert shown.err.count("\n") == 1 and shown.out == ""


def test_for_programs_a_refusal_is_a_document(runs, capsys):
    assert main(["none", f"--runs={runs}", "--json"]) == EXIT_CONFIG
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"] in shown.err


def test_the_output_cannot_be_a_file(runs, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["done", f"--runs={runs}", f"--output={tmp_path / 'file'}"]) == EXIT_CONFIG
    assert "is a file: give a folder" in capsys.readouterr().err


def test_a_name_of_a_stage_that_is_gone(find):
    with pytest.raises(ConfigError, match="has no stage 9"):
        find("done", "--stage=9")


def entry(**rewards: list[float]) -> dict:
    """A set's figures: mean, low and high of two policies for each reward."""

    def figure(mean: float, half: float | None) -> dict:
        ends = (None, None) if half is None else (mean - half, mean + half)
        more = {"p": 0.0004 if half else None, "unit": "picture", "units": 8}
        return {"mean": mean, "low": ends[0], "high": ends[1], **more}

    pairs = {name: (figure(a, half), figure(b, half)) for name, (a, b, half) in rewards.items()}
    return {
        "pictures": 8,
        "prompts": 2,
        "figures": {
            policy: {name: pair[i] for name, pair in pairs.items()}
            for i, policy in enumerate(("base model", "mine"))
        },
        "differences": {
            name: {"mean": figure(b - a, half), "higher": 0.75, "lower": 0.125}
            for name, (a, b, half) in rewards.items()
        },
    }


def shown(found: dict) -> list[str]:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(_table("train", found))
    return console.export_text().splitlines()


def test_the_table_says_how_sure_it_is():
    lines = shown(entry(clip=[0.25, 0.5, 0.125], judge=[1.0, 1.0, None]))
    assert lines[0].strip() == "train: 8 pictures of 2 prompts"
    clip = next(line for line in lines if "clip" in line)
    for text in ("0.250 ± 0.125", "0.500 ± 0.125", "+0.250 ± 0.125", "<0.001", "75%", "12%"):
        assert text in clip
    assert clip.strip().endswith("8 pictures")
    assert "±" not in next(line for line in lines if "judge" in line)


def test_one_reward_does_not_stand_there_twice():
    assert not any("reward" in s for s in shown(entry(reward=[0, 1, 0.1], clip=[0, 1, 0.1])))
    assert any("reward" in s for s in shown(entry(reward=[0, 1, 0.1], clip=[0, 2, 0.1])))


def test_a_reward_that_is_hacked_is_noted(find):
    held = '[{"name": "size", "kind": "jpeg_compressibility"}]'
    given, setting = find("done", f"--evaluation.heldout_rewards={held}")
    rise = np.linspace(0.5, 1.5, 8)

    def evaluated(reward: np.ndarray, size: np.ndarray) -> Evaluation:
        return Evaluation({"reward": reward, "size": size}, [*"aabbccdd"], None, [], {})

    zero = np.zeros(8)
    (note,) = _hacking(given, setting, {"train": [evaluated(zero, zero), evaluated(rise, -rise)]})
    assert "on the train set the reward rises from base model to done, but size" in note
    assert not [*_hacking(given, setting, {"train": [evaluated(zero, zero)] * 2})]
