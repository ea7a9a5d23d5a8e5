"""`b2ray sample`: the same seeds with and without the LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from b2ray.commands.sample import main
from b2ray.diffusion.noise import Domain, normal
from b2ray.diffusion.policy import Policy
from b2ray.errors import EXIT_CONFIG, EXIT_DONE
from tests.models import PROMPTS, config
from tests.unit.commands.conftest import LORA


@pytest.fixture
def sample(runs):
    return lambda run, *more: main([run, f"--runs={runs}", "--device=cpu", *more])


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_it_draws_with_and_without(sample, runs, capsys):
    words = (f"--prompt={PROMPTS[0]}", f"--prompt={PROMPTS[1]}", "--count=3", "--seed=7")
    assert sample("going", *words) == EXIT_DONE
    folder = runs / "going" / "samples" / "001"
    shown = capsys.readouterr().out
    assert f"{folder / 'sheet.png'}\n" in shown and f"{folder}\n" in shown
    names = {
        f"0{p}_seed{s}_{t}.png" for p in (0, 1) for s in (7, 8, 9) for t in ("with", "without")
    }
    assert {p.name for p in folder.iterdir()} == {"sheet.png", *names}
    for p, s in ((0, 7), (1, 9)):
        drawn = [pixels(folder / f"0{p}_seed{s}_{t}.png") for t in ("with", "without")]
        assert drawn[0].shape == (16, 16, 3)
        assert not np.array_equal(*drawn)
    assert sample("going", *words) == EXIT_DONE  # a folder of its own, with the same bytes
    for file in folder.iterdir():
        assert file.read_bytes() == (folder.parent / "002" / file.name).read_bytes()


def test_a_seed_draws_the_same_in_any_company(sample, tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    word = f"--prompt={PROMPTS[0]}"
    assert sample("done", word, "--seed=2", "--count=1", f"--output={one}") == EXIT_DONE
    more = (f"--prompt={PROMPTS[1]}", "--count=3", f"--output={three}")
    assert sample("done", word, *more) == EXIT_DONE
    for title in ("with", "without"):
        a, b = (pixels(f / f"00_seed2_{title}.png").astype(int) for f in (one, three))
        assert np.abs(a - b).max() <= 1  # batches of other sizes round differently
        assert np.abs(a - pixels(three / f"00_seed1_{title}.png")).max() > 1


def test_the_pictures_are_those_of_the_policy_that_was_trained(sample, models, weights, tmp_path):
    words = ("--count=1", "--seed=5", "--steps=3", "--guidance=4", "--eta=0.5")
    assert sample("done", f"--prompt={PROMPTS[2]}", f"--output={tmp_path}", *words) == EXIT_DONE
    settings = {"sampling__steps": 3, "sampling__guidance": 4, "sampling__eta": 0.5}
    for title in ("with", "without"):
        policy = Policy(config(models, **LORA, **settings), torch.device("cpu"))
        if title == "with":
            policy.bind(weights)

        def noise(step: int, shape=policy.latent_shape) -> np.ndarray:
            return normal(5, Domain.SAMPLE, 0, [(0, 1)], step + 1, shape)

        rollout = policy.denoise(torch.from_numpy(noise(-1)), [PROMPTS[2]], 0, 3, noise)
        expected = policy.decode(rollout.latents[:, -1])[0]
        assert np.array_equal(pixels(tmp_path / f"00_seed5_{title}.png"), expected)


def test_prompts_come_from_a_file_too_and_each_counts_once(sample, models, tmp_path, capsys):
    page = tmp_path / "page.png"
    words = ("--prompts", str(models / "prompts.txt"), f"--prompt={PROMPTS[1]}", "--count=5")
    assert sample("done", *words, "--steps=2", "--eta=0", "--output", str(page)) == EXIT_DONE
    assert page.is_file()
    assert len(list((tmp_path / "page").iterdir())) == 2 * 3 * 5
    assert "the first 8 prompts and 4 seeds" in capsys.readouterr().out


def test_a_prompt_that_is_cut_off_is_named(sample, tmp_path, capsys):
    long = " ".join(["red"] * 40)
    words = (f"--prompt={long}", "--count=1", "--steps=2", f"--output={tmp_path}")
    assert sample("done", *words) == EXIT_DONE
    assert f"reads only the beginning of {long!r}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("done",), "nothing to draw: give --prompt TEXT or --prompts FILE"),
        (("done", "--prompts=none.txt"), "--prompts: there is no file 'none.txt'"),
        (("gone", "--prompt=x"), "there is no run 'gone'"),
        (("begun", "--prompt=x"), "has no committed stage yet"),
        (("done", "--prompt=x", "--count=0"), "--count: '0' is no whole number of at least 1"),
        (("done", "--prompt=x", "--seed=-1"), "--seed: '-1' is no whole number of at least 0"),
        (("done", "--prompt=x", "--steps=1"), "--steps is 1: input should be greater"),
        (("done", "--prompt=x", "--eta=2"), "--eta is 2.0: input should be less"),
        (("done", "--prompt=x", "--device=gpu"), "--device 'gpu' cannot be used"),
        (("done", "--prompt=x", "--device=cuda:99"), "--device 'cuda:99' cannot be used"),
    ],
)
def test_wrong_input_is_one_sentence(sample, capsys, words, sentence):
    assert sample(*words) == EXIT_CONFIG
    shown = capsys.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1


def test_a_place_that_cannot_be_is_a_sentence(sample, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ("--prompt=x", "--count=1", "--steps=2", f"--output={tmp_path / 'file' / 'x'}")
    assert sample("done", *words) == EXIT_CONFIG
    assert "cannot be used: Not a directory" in capsys.readouterr().err


def test_a_lora_that_does_not_fit_is_a_sentence(runs, models, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("lora", "summary.json"):
        (other / name).symlink_to(runs / "done" / name)
    settings = (runs / "done" / "config.yaml").read_text()
    (other / "config.yaml").write_text(settings.replace("rank: 2", "rank: 3"))
    assert main([str(other), "--prompt=x", "--device=cpu"]) == EXIT_CONFIG
    assert "rank and base model must be the same" in capsys.readouterr().err


def test_for_programs_there_is_a_document(sample, tmp_path, capsys):
    words = (f"--prompt={PROMPTS[0]}", "--count=2", "--seed=3", "--steps=2", "--json")
    assert sample("going", *words, f"--output={tmp_path}") == EXIT_DONE
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert (found["run"], found["stage"]) == ("going", 2)
    drawn = found["pictures"]
    assert [(p["prompt"], p["seed"]) for p in drawn] == [(PROMPTS[0], 3), (PROMPTS[0], 4)]
    files = {found["sheet"], *(p[title] for p in drawn for title in ("with", "without"))}
    assert {Path(file).name for file in files} == {p.name for p in tmp_path.iterdir()}
    assert "side by side" in shown.err
