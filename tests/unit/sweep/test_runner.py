"""What a sweep finds of earlier calls, and how trials end; tests/ray runs whole ones."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import yaml

from b2ray.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from b2ray.fleet.nodes import NodeResources
from b2ray.run import main
from b2ray.sweep.board import Board
from b2ray.sweep.command import _trial_config, share
from b2ray.sweep.compare import State
from b2ray.sweep.folder import busy, open_sweep
from b2ray.sweep.runner import Process, Runner
from b2ray.tracking.folder import open_run
from tests.unit.sweep.conftest import BASIC, write_lines


@pytest.fixture
def runner(planned):
    """A runner over a plan, made by these fields of the file."""
    boards = []

    def make(**fields: object) -> Runner:
        plan = planned(**fields)
        board = Board("rates", len(plan.trials), 24 * len(plan.trials))
        boards.append(board)
        with open_sweep(plan) as folder:
            return Runner(plan, folder, board)

    yield make
    for board in boards:
        board.close()


def test_what_is_finished_does_not_wait(runner, planned, capsys):
    first, second = planned().trials[:2]
    write_lines(first, 0.3, 0.4, summary={})
    write_lines(second, 0.3, 0.4)
    made = runner()
    assert [t.name for t in made.waiting] == ["lr0.001_seed1", "lr0.003_seed0", "lr0.003_seed1"]
    assert made.outcomes["lr0.001_seed0"].state == State.FINISHED
    assert "lr0.001_seed0: finished before · 1 of 4 trials" in capsys.readouterr().err


def test_what_was_stopped_early_stays_so_while_the_file_asks_for_it(runner):
    early = {"grid": {"learner.lr": [1e-3, 2e-3]}, "stop_early": {"after": 1, "factor": 2}}
    made = runner(**early)
    write_lines(made.plan.trials[0], 0.3, 0.1)
    made.folder.stop_early(made.plan.trials[0], 1)
    again = runner(**early)
    assert again.outcomes["lr0.001"].state == State.STOPPED_EARLY
    assert [t.name for t in again.waiting] == ["lr0.002"]
    assert len(runner(**{**early, "stop_early": None}).waiting) == 2


@pytest.mark.parametrize(
    ("code", "said", "cause"),
    [
        (2, "b2ray: the cluster has no room\n\n", "exit code 2: the cluster has no room"),
        (1, "Traceback\nValueError: x\n", "exit code 1: ValueError: x"),
        (1, "", "exit code 1: it said nothing"),
        (-9, "whatever", "its process was ended by SIGKILL"),
        (3, "b2ray: sampler failed\nDetails: …", "sampler 0 on a failed while denoising: boom"),
    ],
)
def test_the_cause_of_a_failure_is_found(runner, code, said, cause):
    made = runner()
    trial = made.waiting[0]
    write_lines(trial, 0.3)
    made.folder.log(trial).write_text(said)
    if code == 3:
        trace = trial.path / "failure.log"
        trace.write_text("sampler 0 on a failed while denoising: boom\n\nTraceback …")
    ended = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    ended.wait()
    made._end(Process(trial, ended), code)
    assert made.outcomes[trial.name].state == State.FAILED
    assert made.outcomes[trial.name].cause == cause


@pytest.mark.parametrize("handling", [signal.SIG_DFL, signal.SIG_IGN], ids=["shell", "background"])
def test_a_trial_whose_sweep_is_gone_stops_resumably(tmp_path, handling):
    """Its standard input has ended; tests/ray has one that was at work. What a script's shell
    starts in the background ignores SIGINT from its beginning."""
    words = ["--config=configs/quickstart.yaml", f"--runs={tmp_path}"]
    ended = subprocess.run(
        [sys.executable, "-m", "b2ray.run", "--stop-with-stdin", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handling),
    )
    assert ended.returncode == EXIT_STOPPED, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_finished_sweep_shows_its_comparison_again_without_ray(planned, tmp_path, capsys):
    plan = planned("--tracking.uri=http://127.0.0.1:9")
    for trial, value in zip(plan.trials, (0.1, 0.2, 0.3, 0.4), strict=True):
        write_lines(trial, 0.3, value, summary={})
    words = [f"--sweep={tmp_path / 'sweep.yaml'}", f"--runs={tmp_path / 'runs'}"]
    assert main([*words, "--json", "--tracking.uri=http://127.0.0.1:9"]) == EXIT_DONE
    said = capsys.readouterr()
    assert '"best": {\n    "learner.lr": 0.003' in said.out
    assert "MLflow at http://127.0.0.1:9 does not answer" in said.err
    assert (plan.folder / "sweep.json").read_text() == said.out


def test_a_sweep_and_a_run_do_not_share_a_folder(planned):
    plan = planned()
    run = plan.trials[0].config.model_copy(
        update={"name": "rates", "runs": str(plan.folder.parent)}
    )
    with open_run(run):
        pass
    with pytest.raises(ConfigError, match="is the folder of a run"), open_sweep(plan):
        pass


def test_a_sweep_is_held_by_one_process_and_keeps_what_was_asked(planned):
    plan = planned("--learner.inner_epochs=2", curriculum={"stages": 9})
    with (
        open_sweep(plan) as folder,
        pytest.raises(ConfigError, match="in use by another sweep"),
        open_sweep(plan),
    ):
        pass
    kept = yaml.safe_load(folder.spec.read_text())
    assert {k: kept[k] for k in BASIC} == BASIC
    assert (kept["curriculum"], kept["learner"]) == ({"stages": 9}, {"inner_epochs": "2"})


def test_a_run_that_somebody_is_at_is_busy(planned):
    trial = planned().trials[0]
    assert not busy(trial)
    with open_run(trial.config):
        assert busy(trial)
    assert not busy(trial)


@pytest.mark.parametrize(
    ("parallel", "cpus", "expected"),
    [
        ("auto", 3.5, (2, 2)),
        ("auto", 99, (4, 2)),
        ("auto", 2.5, (1, None)),  # two would have to make do with a sampler each
        ("auto", 1.5, (1, None)),
        (2, 2.5, (2, 1)),
        (2, 99, (2, 2)),
        (9, 99, (4, 2)),
        (1, 99, (1, None)),
    ],
)
def test_the_cluster_is_shared_out(planned, parallel, cpus, expected):
    """Each run asks for 0.5 (learner) + 0.25 (scorer) + one or two times 0.5 (samplers) CPUs."""
    configs = [t.config for t in planned().trials]
    found = share(parallel, configs, [NodeResources("a", "host", cpus, 0)])
    assert (found.parallel, found.samplers) == expected


def test_more_than_the_cluster_holds_is_refused(planned):
    configs = [t.config for t in planned().trials]
    with pytest.raises(ConfigError, match="parallel is 3 but the cluster has room for 2 of these"):
        share(3, configs, [NodeResources("a", "host", 2.5, 0)])


@pytest.mark.parametrize(("most", "each", "given"), [(2, 1, 1), (2, 5, 2), (8, 3, 3)])
def test_a_trial_has_its_share_of_samplers(planned, most, each, given):
    config = planned(fleet={"samplers": {"max": most}}).trials[0].config
    made = _trial_config(config, each, "parent")
    assert (made.fleet.samplers.max, made.tracking.parent) == (given, "parent")
    assert made.identity() == config.identity()
