"""A copy of the repository in which the documentation's commands are typed, and a cluster.

Commands of b2ray are called in the tests' process, on warm actors; all others are typed in a shell.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import matplotlib as mpl

from b2ray import cli
from b2ray.config import Config
from b2ray.run import main
from b2ray.shapes.demonstrations import draw
from tests.docs.rules import Known, Way, rule
from tests.docs.small import shortened
from tests.models import save_all, sdxl
from tests.processes import free_port
from tests.runner import ROOT, Runner

COPIED = (
    *("b2ray", "benchmarks", "cluster", "configs", "deploy"),
    *("Makefile", "pyproject.toml", "constraints.txt", "README.md", ".gitignore", ".rayignore"),
)
PYTHON = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
B2RAY = f"""#!/bin/sh
exec "{sys.executable}" -c 'import sys; from b2ray.cli import main; sys.exit(main())' "$@"
"""
FOREIGN = ("RAY_ADDRESS", "RAY_API_", "RAY_AUTH_", "RAY_JOB_")  # would lead to another cluster
WITHIN = 600.0  # seconds after which a command is called hung


class Sandbox:
    """The folder, the variables of its shell, and what has been done in it.

    Attributes:
        modules: the names of the Python modules that the page has as files: a command that names
            one of them needs processes of its own, which find it in the working directory.
    """

    def __init__(self, folder: Path, state: Path, runner: Runner) -> None:
        self.runner = runner
        self.modules: set[str] = set()
        self.joined: dict[str, str] | None = None  # the variables that lead to the cluster
        self.here, self.models, self.state = folder / "b2ray", folder / "models", state
        self.prepared = folder / "prepared"
        self.known = Known(self._shortened, free_port, state)
        for name in COPIED:
            source, target = ROOT / name, self.here / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        self._make_environment()
        save_all(self.models)
        sdxl().save_pretrained(self.models / "xl")
        captions = (self.here / "b2ray/shapes/prompts/train.txt").read_text().splitlines()
        draw(self.here / "FOLDER", captions, 8)

    def _make_environment(self) -> None:
        """.venv as `make` leaves it, whose Python is that of the tests."""
        place = self.here / ".venv" / "bin"
        place.mkdir(parents=True)
        for name, script in (("python", PYTHON), ("b2ray", B2RAY), ("activate", ":\n")):
            (place / name).write_text(script)
            (place / name).chmod(0o755)
        (place.parent / ".ready").touch()
        home = self.here.parent / "home"
        home.mkdir()
        own = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        path = [str(place), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.clean = {
            **own,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(self.here),
            "HOME": str(home),
            "B2RAY_HOME": str(self.here),
            "MPLCONFIGDIR": mpl.get_configdir(),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        }
        self.env = dict(self.clean)

    def begin(self, clustered: bool = False) -> None:
        """Before a page: the variables as they were, and no runs but `mine`.

        Args:
            clustered: whether its commands are about a cluster, which is started once.
        """
        if clustered and self.joined is None:
            self._start_cluster()
        self.env = dict(self.joined or {}) if clustered else dict(self.clean)
        self.modules = set()
        runs = self.here / "runs"
        runs.mkdir(exist_ok=True)
        for run in runs.glob("*/config.yaml"):
            shutil.rmtree(run.parent)
        shutil.rmtree(self.here / "demonstrations", ignore_errors=True)
        if self.prepared.exists():
            shutil.copytree(self.prepared, runs / "mine")

    def prepare(self) -> None:
        """The run that pages speak of as `mine`: the demo's."""
        self.begin()
        text = "python -m b2ray.run --config configs/quickstart.yaml --name=mine"
        self.do(text.split(), text)
        shutil.copytree(self.here / "runs" / "mine", self.prepared)

    def _start_cluster(self) -> None:
        """Ray on two nodes, as `cluster/local.py` starts it."""
        self.env, self.joined = dict(self.clean), {}
        sizes = f"--cpus 2 --object-store-mib 150 --state {self.state}"
        done = self.shell(f'eval "$(python cluster/local.py start --nodes 2 {sizes})"')
        assert done.returncode == 0, done.stdout
        self.joined = dict(self.env)

    def close(self) -> None:
        """Stop the cluster, if one was started."""
        if self.joined is not None:
            self.env = dict(self.clean)
            done = self.shell(f"python cluster/local.py stop --state {self.state}")
            assert done.returncode == 0, done.stdout

    def write(self, name: str, text: str) -> None:
        """A file of the page."""
        (self.here / name).write_text(text)
        if name.endswith(".py"):
            self.modules.add(name.removesuffix(".py"))

    def do(self, words: list[str], text: str) -> None:
        """Run a command by its rule.

        Raises:
            AssertionError: it failed, with what it said.
        """
        found = rule(words)
        assert found is not None, (
            "nobody has said how to run this command: give its first words a rule in "
            "tests/docs/rules.py, or list it there in LOOKED_AT with the reason why it cannot be "
            "run here"
        )
        with contextlib.chdir(self.here):
            way = found(words, text, self.known)
        name, runs = way.fresh or way.unfinished, self.here / "runs"
        if way.fresh:
            shutil.rmtree(runs / name, ignore_errors=True)
        if way.key in self.known.done:
            if way.fresh and self.prepared.exists():
                shutil.copytree(self.prepared, runs / name)
            return
        if way.unfinished:
            unfinish(runs / name)
        if way.before:
            self._must(self.shell(way.before))
        if way.serves:
            self._serve(way)
        else:
            own_modules = any(name in way.text for name in self.modules)
            run = self.inside if way.inside and not own_modules else self.shell
            done = self._must(run(way.text))
            job = re.search(r"Job '(\w+)' submitted", done.stdout)
            self.known.job = job[1] if job else self.known.job
        self.known.done.add(way.key)
        self.known.done.discard("")

    def _must(self, done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
        """What was run, which must have gone well."""
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.args}\n{done.stdout}"
        return done

    def inside(self, text: str) -> subprocess.CompletedProcess[str]:
        """Call a command of b2ray in this process, in the sandbox's folder and variables."""
        said = io.StringIO()
        own = {key: value for key, value in self.env.items() if not key.startswith(FOREIGN)}
        with (
            contextlib.chdir(self.here),
            mock.patch.dict(os.environ, own),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            code = self.runner.call(command, shlex.split(text))
        return subprocess.CompletedProcess(text, code, said.getvalue())

    def shell(self, text: str) -> subprocess.CompletedProcess[str]:
        """Type a line; what it exports stays."""
        with tempfile.NamedTemporaryFile() as kept:
            line = f"{text}\ncode=$?\nenv -0 > {kept.name}\nexit $code\n"
            process = self._start(line)
            try:
                said, _ = process.communicate(timeout=WITHIN)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                said = f"{process.communicate()[0]}\nnot done after {WITHIN:g} s"
            done = subprocess.CompletedProcess(text, process.returncode, said)
            pairs = [entry.split("=", 1) for entry in Path(kept.name).read_text().split("\0")]
            self.env = {pair[0]: pair[1] for pair in pairs if len(pair) == 2} or self.env
        return done

    def _start(self, text: str) -> subprocess.Popen[str]:
        """A shell in a session of its own."""
        return subprocess.Popen(
            ["bash", "-c", text],
            cwd=self.here,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _serve(self, way: Way) -> None:
        """Start a server, read its page, and end it as Ctrl-C does."""
        server = self._start(way.text)
        try:
            until = time.monotonic() + WITHIN
            while not _answers(way.serves):
                assert server.poll() is None, server.stdout and server.stdout.read()
                assert time.monotonic() < until, f"{way.text} does not serve {way.serves}"
                time.sleep(0.2)
        finally:
            os.killpg(server.pid, signal.SIGINT)
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:  # as where the tests' own SIGINT is ignored
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()

    def _shortened(self, argv: Sequence[str]) -> tuple[list[str], str, str]:
        short, config = shortened(list(argv), self.models)
        return short, alike(config), config.name


def command(words: list[str]) -> int:
    """`python -m b2ray.run …` or `b2ray …`, as their first functions; returns the exit code."""
    with mock.patch.object(sys, "argv", words), mock.patch.object(sys, "path", [*sys.path]):
        try:
            return main(words[3:]) if words[0] == "python" else cli.main()
        except SystemExit as end:  # after --help
            return int(end.code or 0)


def alike(config: Config) -> str:
    """What runs have in common that need not be run twice: all but amounts that change no code's
    way."""
    objective = {"kl_weight": float(config.objective.kl_weight > 0)}
    same = {
        "seed": 0,
        "learner": config.learner.model_copy(update={"lr": 1.0}),
        "objective": config.objective.model_copy(update=objective),
    }
    found = config.model_copy(update=same)
    return repr((found.identity(), found.fleet))


def unfinish(run: Path) -> None:
    """Take a finished run back to before its last stage, as if it had been killed there."""
    (run / "summary.json").unlink()
    shutil.rmtree(sorted((run / "checkpoints").glob("stage-*"))[-1])


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10) as page:
            return page.status == 200
    except (urllib.error.URLError, OSError):
        return False
