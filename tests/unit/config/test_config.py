"""What a configuration may be, and that it stays cheap to look at."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from b2ray.config import SUMMARY_WORDS, Config
from b2ray.config.load import parse, validated
from b2ray.config.paths import PACKAGE
from b2ray.errors import ConfigError

CLIP = {"name": "clip", "kind": "clip"}
SHOWN = {"preset": "sqil", "demonstrations": {"path": "folder"}, "rewards": []}


@pytest.fixture
def config(tmp_path) -> Callable[..., Config]:
    """Makes a configuration from a file of these sections and the two that are needed."""

    def make(**sections: object) -> Config:
        values = {"prompts": {"train": "p.txt"}, "rewards": [CLIP], **sections}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return parse([f"--config={path}"]).config

    return make


@pytest.fixture
def refusal(config) -> Callable[..., str]:
    """The one sentence with which such a file is refused."""

    def refuse(**sections: object) -> str:
        with pytest.raises(ConfigError) as caught:
            config(**sections)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return refuse


# method.md §5: branches, interval at T = 20, selection and its thresholds, centre, clip range on
# Stable Diffusion's 16 384 latent elements.
TABLE = {
    "ddpo": (1, (20, 20), "all", (None, None), "prompt", 1e-4),
    "bpt_only": (1, (14, 20), "all", (None, None), "prompt", 1e-4),
    "bs_only": (5, (14, 14), "best_worst", (None, None), "group", 1e-4),
    "b2_released": (5, (14, 20), "best_worst", (0.5, -0.5), "prompt", 0.1),
    "b2": (5, (10, 20), "best_worst", (None, None), "group", 1e-4),
    # What else the paper's branches can drive.
    "ddpo_sf": (1, (20, 20), "all", (None, None), "prompt", 1e-4),
    "dpok": (1, (20, 20), "all", (None, None), "prompt", 1e-4),
    "d3po": (2, (20, 20), "best_worst", (None, None), "group", 1e-4),
    "grpo": (8, (20, 20), "all", (None, None), "group", 1e-4),
    "sqil": (1, (20, 20), "all", (None, None), "prompt", 1e-4),
}


def learnt_from(preset: str) -> dict[str, object]:
    """The preset, with what it learns from."""
    return SHOWN if preset == "sqil" else {"preset": preset}


@pytest.mark.parametrize("preset", TABLE)
def test_a_preset_is_its_column_of_the_papers_table(config, preset):
    c = config(**learnt_from(preset))
    found = (
        c.branching.branches,
        c.interval_bounds,
        c.selection.kind,
        (c.selection.best_above, c.selection.worst_below),
        c.advantage.center,
        c.objective.clip_nats / 16384,
    )
    assert found[:-1] == TABLE[preset][:-1]
    assert found[-1] == pytest.approx(TABLE[preset][-1])


def test_every_preset_has_its_file_and_the_files_are_all_presets():
    assert {p.stem for p in (PACKAGE / "presets").glob("*.yaml")} == set(TABLE)


def test_the_default_is_b2_over_the_papers_stage(config):
    c = config()
    assert c.preset == "b2"
    assert c.advantage.center == "group"
    assert c.groups == 256
    assert (c.sampling.steps, c.sampling.guidance, c.curriculum.stages) == (20, 5.0, 100)
    assert c.model.lora.rank == 4


def test_the_released_window_is_eight_earlier_stages_with_clamp_five(config):
    advantage = config(preset="b2_released").advantage
    assert (advantage.window, advantage.clamp, advantage.min_count) == (8, 5.0, 2)


@pytest.mark.parametrize(
    ("start", "end", "bounds"),
    [(None, None, (20, 20)), (4, 20, (4, 20)), (0.5, None, (10, 20)), (0.01, 1, (1, 1))],
)
def test_an_interval_is_given_in_steps_or_as_a_fraction_of_t(config, start, end, bounds):
    assert config(curriculum={"start": start, "end": end}).interval_bounds == bounds


def test_as_many_whole_groups_as_fit_are_sampled(config):
    assert config(branching={"images": 13, "branches": 5}).groups == 2


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"branching": {"branches": 1}}, ["branching.branches is 1", "center=group", "ddpo"]),
        (
            {"preset": "ddpo", "selection": {"kind": "best_worst", "require_pair": True}},
            ["branching.branches is 1", "require_pair", "at least 2"],
        ),
        (
            {"preset": "ddpo", "curriculum": {"extend": "spread"}},
            ["curriculum.extend is spread", "branching.branches is 1", "at least 2"],
        ),
        (
            {"objective": {"kind": "dpo"}},
            ["objective.kind is dpo", "selection.require_pair=true", "--preset=d3po"],
        ),
        ({"curriculum": {"start": 30}}, ["curriculum", "30", "sampling.steps is 20", "lower it"]),
        ({"curriculum": {"start": 20, "end": 4}}, ["curriculum.end (4)", "(20)", "swap"]),
        ({"curriculum": {"start": 2.5}}, ["curriculum.start is 2.5", "whole number"]),
        ({"sampling": {"eta": 0}}, ["sampling.eta is 0", "use up to 1.0"]),
        (
            {"selection": {"best_above": 0.0, "worst_below": 1.0}},
            ["selection.worst_below (1.0)", "selection.best_above (0.0)", "smaller"],
        ),
        ({"branching": {"images": 3}}, ["branching.branches is 5", "images is 3", "raise"]),
        ({"name": "a/b"}, ["name is 'a/b'"]),
        ({"name": "../up"}, ["name is '../up'"]),
        ({"name": ""}, ["name is ''"]),
        ({"seed": -1}, ["seed is -1", "greater than or equal to 0"]),
        ({"learner": {"lr": float("nan")}}, ["learner.lr is nan", "finite"]),
        (
            {"learner": {"max_lag": 1, "recompute_log_probs": True}},
            ["learner.max_lag is 1", "learner.recompute_log_probs is true", "max_lag=0"],
        ),
        (
            {"replay": {"stages": 2}, "learner": {"recompute_log_probs": True}},
            ["replay.stages is 2", "learner.recompute_log_probs is true", "replay.stages=0"],
        ),
        (
            {"replay": {"stages": 1}, "preset": "dpok"},
            ["replay.stages is 1", "objective.kind is policy_gradient", "objective.kind=ppo"],
        ),
        (
            {"replay": {"stages": 1, "trajectories": 1}, "preset": "d3po"},
            ["replay.trajectories is 1", "objective.kind is dpo", "at least 2"],
        ),
        ({"replay": {"stages": -1}}, ["replay.stages is -1", "greater than or equal to 0"]),
        ({"replay": {"trajectories": 0}}, ["replay.trajectories is 0", "greater than or equal"]),
        ({"learner": {"max_lag": 2}}, ["learner.max_lag is 2", "less than or equal to 1"]),
        ({"learner": {"ranks": 0}}, ["learner.ranks is 0", "greater than or equal to 1"]),
        (
            {"model": {"dtype": "bfloat16", "lora": {"merged": True}}},
            ["model.lora.merged is true", "model.dtype=bfloat16", "model.dtype=float32"],
        ),
        ({"sampling": {"steps": "many"}}, ["sampling.steps is 'many'", "integer"]),
        ({"sampling": 3}, ["sampling is 3"]),
        ({"preset": "reinforce"}, ["preset is 'reinforce'", "b2_released", "bs_only"]),
        ({"sampling": {"stepz": 3}}, ["sampling.stepz is not a field", "3", "--help"]),
        ({"rewards": []}, ["rewards is empty", "at least 1", "--demonstrations.path="]),
        ({"demonstrations": {"path": ""}}, ["demonstrations.path is ''"]),
        (SHOWN | {"rewards": [CLIP]}, ["rewards has 1", "'folder'", "heldout_rewards"]),
        (SHOWN | {"preset": "b2"}, ["branching.branches is 5", "'folder'", "--preset=sqil"]),
        (SHOWN | {"selection": {"kind": "best_worst"}}, ["selection.kind is best_worst", "all"]),
        (SHOWN | {"branching": {"images": 1}}, ["branching.images is 1", "at least 2"]),
        (SHOWN | {"objective": {"kind": "dpo"}}, ["objective.kind is dpo"]),
        (SHOWN | {"replay": {"stages": 2}}, ["replay.stages is 2", "'folder'", "replay.stages=0"]),
        (
            {"sampling": {"steps": 4}, "objective": {"step_weights": [1, 2]}},
            ["objective.step_weights has 2 numbers", "sampling.steps is 4", "one for each step"],
        ),
        (
            {
                "sampling": {"steps": 4},
                "objective": {"step_weights": [1, 2, 0, 0]},
                "curriculum": {"start": 2},
            },
            ["objective.step_weights is 0", "the last 2 steps", "curriculum.start"],
        ),
        (
            {"objective": {"step_weights": [1, -2]}},
            ["objective.step_weights is [1, -2]", "'none'", ", or input", "equal to 0"],
        ),
        ({"learner": {"batch": 0}}, ["learner.batch is 0", "equal to 1, or", "'all'"]),
        ({"rewards": [CLIP, CLIP]}, ["'clip' is used twice"]),
        (
            {"evaluation": {"heldout_rewards": [CLIP]}},
            ["'clip' is used twice"],
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(refusal, sections, words):
    message = refusal(**sections)
    assert [w for w in words if w not in message] == []


@pytest.mark.parametrize("missing", ["prompts", "rewards"])
def test_a_missing_section_is_named_with_its_option(missing):
    values = {"prompts": {"train": "p.txt"}, "rewards": [CLIP]}
    del values[missing]
    with pytest.raises(ConfigError, match=rf"{missing}\S* is .*: .*--{missing}\S*="):
        validated(values)


def test_half_of_the_images_are_demonstrations(config):
    assert config(**SHOWN, branching={"images": 13}).groups == 6


def test_a_reward_may_not_be_named_as_another_figure(refusal):
    # `reward/mean` is the sum; pairwise, vendi and step stand beside the rewards in evaluations.
    for name in (*SUMMARY_WORDS, "mean", "pairwise", "vendi", "step"):
        assert f"{name!r}" in refusal(rewards=[{"name": name, "kind": "clip"}])


@pytest.mark.parametrize(
    ("fleet", "words"),
    [
        ({"samplers": {"min": 3, "max": 2}}, "max is 2, below min, which is 3"),
        ({"samplers": {"max": "auto", "cpus": 0}}, "max is auto, but cpus and gpus are 0"),
    ],
)
def test_samplers_that_cannot_be_are_refused(refusal, fleet, words):
    assert words in refusal(fleet=fleet)


def test_ranks_that_ask_for_nothing_are_refused(refusal):
    fleet = {"learner": {"cpus": 0}}
    assert "learner.ranks is 2 but fleet.learner.cpus" in refusal(learner={"ranks": 2}, fleet=fleet)


@pytest.mark.parametrize(
    "sections", [{}, {"preset": "d3po"}, {"learner": {"max_lag": 1}}, {"preset": "ddpo"}]
)
def test_replay_is_off_unless_asked_and_goes_with_the_rest(config, sections):
    assert config(**sections).replay.stages == 0
    found = config(**sections, replay={"stages": 2})
    assert (found.replay.stages, found.replay.trajectories) == (2, 64)
    assert found.identity() != config(**sections).identity()


def test_a_config_does_not_change(config):
    with pytest.raises(Exception, match="frozen"):
        config().seed = 3


def test_identity_leaves_out_what_does_not_change_the_result(config):
    fleet = {"samplers": {"max": 7}}
    same = config(name="other", runs="elsewhere", fleet=fleet, tracking={"experiment": "x"})
    assert same.identity() == config().identity()
    assert config(seed=1).identity() != config().identity()
    assert config(learner={"ranks": 2}).identity() != config().identity()


def test_every_field_explains_itself():
    silent = []

    def walk(model: type, prefix: str) -> None:
        for name, field in model.model_fields.items():
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                walk(inner, f"{prefix}{name}.")
            elif not field.description:
                silent.append(prefix + name)

    walk(Config, "")
    assert silent == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("b2ray.config", "torch ray diffusers transformers mlflow numpy"),
        ("b2ray.config.load", "torch ray diffusers transformers mlflow"),
        ("b2ray.run", "torch diffusers transformers mlflow peft"),
    ],
)
def test_importing_starts_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print(*[m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
