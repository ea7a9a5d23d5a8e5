"""The ruler (benchmarks/speed): its floor does a stage's work, its tables say what was found."""

from __future__ import annotations

import json

import pytest

from b2ray.algorithm.cost import plan_cost
from b2ray.config import Config
from b2ray.config.paths import find
from benchmarks.speed import inside, peer, report
from benchmarks.speed.floor import calls, fastest
from benchmarks.speed.growth import SIZES, Point, sized, slope
from benchmarks.speed.ours import read
from benchmarks.speed.released import chosen
from benchmarks.speed.workloads import WORKLOADS, Work, layout, quick, work
from benchmarks.tables import fill

QUICK = [quick(w) for w in WORKLOADS]
GROWN = [sized(what, size) for what, sizes in SIZES.items() for size in sizes]


def test_the_floor_does_a_stages_work_as_the_run_plans_it():
    workloads = [*WORKLOADS, *QUICK, *GROWN]
    configs = [(workload, workload.config(layout(2))) for workload in workloads]
    assert configs
    assert [workload for workload, config in configs if works(config) != planned(config)] == []


def works(config: Config) -> tuple[int, int, int, int]:
    """What the floor does in a run's stages: pictures, and the UNet's evaluations."""
    stage, stages = work(config), config.curriculum.stages
    learning = stage.trained + stage.scored_again
    whole = (stage.pictures, stage.sampled, learning, stage.evaluations)
    return tuple(stages * count for count in whole)


def planned(config: Config) -> tuple[int, int, int, int]:
    """The same as the run plans it."""
    cost = plan_cost(config)
    learning = cost.unet_evals_learning
    return cost.reward_queries, cost.unet_evals_sampling, learning, cost.unet_evals


def test_an_interval_that_grows_has_no_one_work():
    config = WORKLOADS[0].config({"curriculum.start": 2})
    with pytest.raises(ValueError, match="stays as it is"):
        work(config)


def test_rivals_do_what_they_can_do():
    by = {rival: w.config() for w in WORKLOADS for rival in w.rivals}
    released, ddpo = by["released"], by["peer"]
    assert released.selection.kind == "best_worst" and released.objective.kl_weight == 0
    assert ddpo.selection.kind == "all" and ddpo.objective.kl_weight == 0
    assert ddpo.interval_bounds == (ddpo.sampling.steps,) * 2
    # trl's batches are whole, those of sampling of those of training; its adapter has this rank.
    assert ddpo.branching.images % ddpo.branching.branch_batch == 0
    assert ddpo.branching.branch_batch % ddpo.learner.batch == 0
    assert (ddpo.model.lora.rank, ddpo.model.lora.alpha) == (4, 4)


def test_shares_add_up_to_the_whole():
    whole = Work(sampled=7, scored_again=0, trained=5, pictures=3)
    shares = [whole.share(rank, 3) for rank in range(3)]
    assert [s.sampled for s in shares] == [3, 2, 2]
    assert sum(s.evaluations for s in shares) == whole.evaluations
    assert sum(s.pictures for s in shares) == 3


def test_calls_are_whole_but_for_the_last():
    assert calls(70, 32) == [32, 32, 6]
    assert calls(64, 32) == [32, 32]
    assert calls(3, 32) == [3]
    assert calls(0, 32) == []


def test_the_fastest_batch_is_so_by_the_row():
    assert fastest({4: 0.05, 16: 0.16, 64: 0.8}) == 16


def test_a_stage_is_timed_without_its_evaluation():
    lines = [
        {"step": 0, "time": 1020.0, "time/total": 3.0, "time/evaluate": 2.5},
        {
            "time/total": 13.0,
            "time/sample": 4.0,
            "cost/unet_evals": 100.0,
            "cost/reward_queries": 20.0,
            "memory/sampler": 0.5,
        },
        {
            "time/total": 26.0,
            "time/sample": 6.0,
            "time/evaluate": 1.0,
            "cost/unet_evals": 200.0,
            "cost/reward_queries": 40.0,
            "memory/sampler": 0.6,
        },
    ]
    ran = read(lines, began=1000.0)
    assert ran.seconds == [10.0, 12.0] and ran.stage == 11.0
    assert ran.start == pytest.approx(17.5)
    assert ran.evaluations == 100.0
    assert ran.figures["time/sample"] == 5.0
    assert ran.figures["cost/reward_queries"] == 20.0


def measured() -> list[dict]:
    found = []
    for repetition, factor in enumerate((1.0, 2.0, 3.0)):
        for who, seconds in (("floor", 2.0), ("b2ray", 2.5), ("peer", 5.0)):
            found.append(
                {
                    "workload": "a",
                    "who": who,
                    "repetition": repetition,
                    "images": 10,
                    "seconds": seconds * factor,
                    "parts": {"sampling": 1.0},
                    "start": 9.0,
                    "figures": {"time/sample": 1.0, "cost/bytes_pictures": 2**20},
                }
            )
    return found


def test_ratios_are_taken_within_a_repetition():
    found = measured()
    assert report.over(found, "a", "b2ray", "floor") == [1.25, 1.25, 1.25]
    assert report.over(found, "a", "peer", "b2ray") == [2.0, 2.0, 2.0]
    rows = [line.split(" | ") for line in report.speed(found).splitlines()]
    ours = next(r for r in rows if r[1] == "b2ray")
    assert ours[2] == "5.0 (2.5 – 7.5)" and ours[4] == "1.25 (1.25 – 1.25)"


def test_what_is_no_phase_is_the_rest():
    lines = dict(
        line.strip("| ").split(" | ") for line in report.phases(measured()).splitlines()[2:]
    )
    assert lines["`time/sample`"] == "1.00 s"
    assert lines["the rest of a stage"] == "4.00 s"
    assert lines["`cost/bytes_pictures`"] == "1.00 MiB"


def test_texts_go_between_their_marks(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    fill(file, {"speed": "new"})
    assert file.read_text() == "before\n<!-- speed -->\nnew\n<!-- /speed -->\nafter\n"


def test_the_page_has_all_marks():
    text = find("docs/evidence/performance.md").read_text(encoding="utf-8")
    for mark in ("speed", "phases", "machine", "growth", "inside", "batches"):
        assert text.count(f"<!-- {mark} -->\n") == text.count(f"<!-- /{mark} -->") == 1


def test_a_stage_is_taken_apart_in_processor_time():
    found = inside.measure(QUICK[0].config())
    for phase in found.values():
        assert 0 < phase.parts["UNet"] < phase.whole and phase.rest > 0
    assert found["sampling"].parts.keys() == {"UNet", "decoding", "scoring"}
    line = inside.table({"a": found}).splitlines()[2]
    assert line.startswith("| a | sampling | ") and line.endswith("% |")


def test_the_exponent_of_a_straight_line_is_one():
    points = [Point(n, 3.0 * n, 10 * n) for n in (2, 4, 8)]
    assert slope(points) == pytest.approx(1.0)
    assert slope([Point(p.size, p.seconds * p.size, 1) for p in points]) == pytest.approx(2.0)


def test_the_released_schedule_trains_the_best_and_the_worst_of_a_group():
    prompts = [(group, branch, "a prompt") for branch in range(3) for group in range(2)]
    scores = [0.0, 1.0, 3.0, 0.0, 1.5, 5.0]  # group 0: 0, 3, 1.5; group 1: 1, 0, 5
    rows, advantage = chosen(prompts, scores)
    assert rows == [2, 0, 5, 3]
    assert [a > 0 for a in advantage] == [True, False, True, False]
    assert advantage[0] == pytest.approx(-advantage[1])


def test_a_tokenizer_is_written_in_its_older_form(tmp_path):
    base = find(WORKLOADS[0].config().model.path)
    copy = peer.as_it_was(base, tmp_path / "base")
    table = json.loads((base / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((copy / "tokenizer" / "vocab.json").read_text()) == table["vocab"]
    first, *merges = (copy / "tokenizer" / "merges.txt").read_text().splitlines()
    assert first.startswith("#version") and len(merges) == len(table["merges"])
    assert merges[0] == "l e</w>"
