"""What `b2ray check` says of drift, memory and rewards; tests/ray runs the whole command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from b2ray.actors.worker import Memory
from b2ray.commands import calls
from b2ray.commands.check import GIB, Finding, _drift, _memory, _rewards, _show, main
from b2ray.errors import EXIT_CONFIG
from tests.models import config


@pytest.mark.parametrize(
    ("over", "drift", "sound", "words"),
    [
        ({}, 1e-5, True, "of the clip range 1.0e-04"),
        ({}, 2e-5, False, "set learner.recompute_log_probs=true"),
        ({"learner__recompute_log_probs": True}, 2e-5, True, "recomputed in the learner"),
        ({"learner__max_ratio_drift": 0.5}, 2e-5, True, "20.0%"),
    ],
)
def test_drift_is_held_against_the_clip_range(models, over, drift, sound, words):
    found = _drift(config(models, **over), {2: drift / 2, 3: 1.5 * drift}, 16384)
    assert (found.sound, words in found.found, "step 3" in found.found) == (sound, True, True)


def test_an_interval_without_a_trainable_step_is_refused(models):
    assert _drift(config(models), {}, 16384).sound is False


@pytest.mark.parametrize(("second", "fits"), [(30, True), (60, False)])
def test_actors_that_share_a_device_are_added_up(second, fits):
    def actor(gib: int, device: str) -> Memory:
        return Memory("here", device, gib * GIB, 80 * GIB)

    found = {"sampler 0": actor(40, "gpu 0"), "learner 0": actor(second, "gpu 0")}
    *actors, first, other = _memory({**found, "scorer 0": actor(70, "gpu 1")})
    assert len(actors) == 3
    assert (first.what, first.sound) == ("gpu 0", fits)
    assert ("model.offload" in first.found) == (not fits)
    assert other.sound is True


def test_a_reward_that_says_the_same_of_all_is_no_reward(models):
    (flat,) = _rewards(config(models), {"clip": np.full((2, 3), 0.5)})
    assert flat.sound is False
    (sound,) = _rewards(config(models), {"clip": np.array([[0.0, 1.0, 2.0]] * 2)})
    assert sound.sound is True and "std 0.816 within a group" in sound.found


def test_what_is_shown_is_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    numbers = ", ".join(f"0.{n:04d}" for n in range(30))
    words = f"step_weights: [{numbers}], a_name_that_is_wider_than_the_terminal_{'x' * 80}, [bold]"
    _show([Finding("step weights", words)])
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 60
    assert words.replace(" ", "") in "".join(shown.split())


def test_a_refusal_is_a_finding_and_the_document_is_whole(capsys):
    assert main(["--config=none.yaml", "--json"]) == EXIT_CONFIG
    found = json.loads(capsys.readouterr().out)
    assert found["sound"] is False
    (last,) = found["findings"]
    assert last["what"] == "stopped at" and "none.yaml" in last["found"]


def test_its_help_is_about_itself(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: b2ray check") and "--variance" in shown
    assert "--curriculum.stages" not in shown and "b2ray run --help" in shown


def paced(**seconds: float | None) -> calls.Sizes:
    tried = [calls.Size(int(rows[1:]), s) for rows, s in seconds.items()]
    return calls.Sizes("learner.microbatch", 8, tried)


def test_the_smallest_call_that_is_about_as_fast_fits():
    # 4, 2.05 and 2 ms a latent: 16 is within 3 % of 32.
    found = paced(_4=0.016, _16=0.0328, _32=0.064)
    assert found.fit == 16
    assert str(found) == "4: 4, 16: 2.05, 32: 2"


def test_a_call_without_room_does_not_fit():
    found = paced(_4=0.016, _8=None)
    assert found.fit == 4 and str(found) == "4: 4, 8: no room"
    assert paced(_1=None).fit is None


def test_calls_are_tried_as_far_as_a_stage_has_rows(models):
    class Asked:
        def time_call(self, role: str, rows: int) -> float:
            asked.setdefault(role, []).append(rows)
            return 40.0 if rows == 8 else 0.1

    asked: dict[str, list[int]] = {}
    one = config(models, branching__images=12, branching__branches=3, learner__batch=3)
    sampler, learner = calls.measure(one, Asked())
    steps = one.learner.drawn_steps(one.interval_bounds[1])
    assert asked["sampler"] == [1, 2, 4, 8]
    assert asked["learner"] == [r for r in (1, 2, 4, 8) if r <= 3 * steps]
    assert (sampler.given, learner.given) == (one.branching.branch_batch, one.learner.microbatch)
    # A call that takes longer than anybody waits for is the last.
    more = config(models, branching__images=48, branching__branches=3)
    next(calls.measure(more, Asked()))
    assert asked["sampler"] == [1, 2, 4, 8] * 2
    # More ranks than trajectories: one has a row all the same.
    few = config(models, branching__images=12, learner__batch=1, learner__ranks=9)
    *_, learner = calls.measure(few, Asked())
    assert learner.tried[0].rows == 1
