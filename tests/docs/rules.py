"""How each command of the documentation is run by the tests.

A command is known by its first words: `RULES` says what is done with it. What cannot be run here is
in `LOOKED_AT`, word by word and with the reason. A command that is in neither fails the tests.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLUSTER = "it needs a cluster that is not here"
CLOUD = "it needs a cloud and its credentials"
KUBERNETES = "it needs a Kubernetes cluster"
NETWORK = "it needs a package index or a hub"
HOURS = "it takes minutes to hours; tests/unit and tests/ray have its parts"
ELSEWHERE = "it needs files from elsewhere; tests/ray/test_evaluate.py has its like"
MEASURES = "it writes what it measures into docs/"
ITSELF = "it is the tests themselves, or changes files of the repository"

LOOKED_AT = {
    "make test": ITSELF,
    "make test-all": ITSELF,
    "make test-fast": ITSELF,
    "make style": ITSELF,
    "make chaos": ITSELF,
    "make quality": ITSELF,
    "make docs": "tests/docs/test_site.py builds the site",
    ".venv/bin/python -m benchmarks.efficiency": HOURS,
    ".venv/bin/python -m benchmarks.speed": HOURS,
    ".venv/bin/python -m benchmarks.startup": MEASURES,
    ".venv/bin/python -m benchmarks.speed --inside": HOURS,
    ".venv/bin/python -m benchmarks.speed --cost-growth": HOURS,
    "b2ray evaluate --config my.yaml --lora somebodys.safetensors": ELSEWHERE,
    "b2ray evaluate --config my.yaml": ELSEWHERE,
    "b2ray run --sweep configs/sweeps/quickstart.yaml": HOURS,
    "python3.11 -m venv .venv": "the sandbox has its .venv",
    ".venv/bin/pip install torch==2.13.0": NETWORK,
    "hf download CompVis/stable-diffusion-v1-4 --local-dir models/sd14": NETWORK,
    "pip install boto3": NETWORK,
    "ray up cluster/aws.yaml": CLOUD,
    "ray dashboard cluster/aws.yaml": CLOUD,
    "ray rsync-down cluster/aws.yaml /data/runs/mine/ runs/mine/": CLOUD,
    "ray down cluster/aws.yaml": CLOUD,
    "export MLFLOW_TRACKING_URI=http://127.0.0.1:5000": "its server has been ended by then",
    "export RAY_AUTH_MODE=token": CLUSTER,
    "export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265": CLUSTER,
    "sbatch --nodes=4 --gpus-per-node=1 cluster/slurm.sh python -m b2ray.run "
    "--config configs/sd14_template1.yaml": "it needs Slurm; tests/ray/test_slurm.py plays it",
    "docker build --file deploy/Dockerfile --tag REGISTRY/b2ray:0.1.0 .": "it needs Docker",
    "docker push REGISTRY/b2ray:0.1.0": "it needs Docker and a registry",
    "kubectl label node NODE b2ray-capacity=on-demand": KUBERNETES,
    "kubectl label node NODE b2ray-capacity=spot": KUBERNETES,
    "kubectl create namespace b2ray && kubectl config set-context --current --namespace=b2ray": (
        KUBERNETES
    ),
    "kubectl apply -f deploy/storage.yaml -f deploy/networkpolicy.yaml -f deploy/mlflow.yaml": (
        KUBERNETES
    ),
    "kubectl apply -f deploy/prometheus.yaml": KUBERNETES,
    "kubectl create secret generic b2ray-environment --from-file=HF_TOKEN=TOKEN_FILE": KUBERNETES,
    "kubectl apply -f deploy/rayjob.yaml": KUBERNETES,
    "kubectl get rayjob b2ray --watch": KUBERNETES,
    "kubectl logs --follow -l job-name --prefix": KUBERNETES,
    "kubectl port-forward service/mlflow 5000": KUBERNETES,
    "kubectl delete rayjob b2ray": KUBERNETES,
    "kubectl get rayjob b2ray -o jsonpath='{.status.message}'": KUBERNETES,
    "kubectl apply -f deploy/raycluster.yaml": KUBERNETES,
    "kubectl port-forward service/b2ray-head-svc 8265": KUBERNETES,
    "export RAY_AUTH_TOKEN=$(kubectl get secret b2ray -o jsonpath='{.data.auth_token}' | "
    "base64 --decode)": KUBERNETES,
    "ray job submit --runtime-env deploy/runtime_env.yaml -- python -m b2ray.run "
    "--config configs/sd14_template1.yaml --name=mine --runs=/runs": (
        "its runtime environment installs packages, and /runs is a volume"
    ),
}

# Python that is only compiled, by its page.
COMPILED = {
    "docs/reference/mlflow.md": "it needs a server; tests/ray/test_model.py loads a model both ways"
}


@dataclass(frozen=True)
class Way:
    """How a command is run.

    Attributes:
        text: what the shell gets.
        inside: whether it is a command of b2ray that needs no process of its own: its main function
            is called in the tests' process, on warm actors.
        before: what the shell gets first.
        serves: whether it is a server: asked once for its page, then interrupted.
        key: commands of one key are run once in a session; empty: every time.
        fresh: the run that must not be there before.
        unfinished: the run that must be there, and not be finished.
    """

    text: str
    inside: bool = False
    before: str = ""
    serves: str = ""
    key: str = ""
    fresh: str = ""
    unfinished: str = ""


@dataclass
class Known:
    """What the rules need to know.

    Attributes:
        shorten: the arguments of a run on small models, the key of what they do, and its name.
        job: the last job that was submitted.
        done: keys of what has been run.
        port: a free port.
        state: where `cluster/local.py` keeps the session's cluster.
    """

    shorten: Callable[[Sequence[str]], tuple[list[str], str, str]]
    port: Callable[[], int]
    state: Path
    job: str = ""
    done: set[str] = field(default_factory=set)


Rule = Callable[[list[str], str, Known], Way]


def as_it_is(words: list[str], text: str, known: Known) -> Way:
    """Nothing is changed."""
    return Way(text)


def once(words: list[str], text: str, known: Known) -> Way:
    """The same on every page."""
    return Way(text, key=shlex.join(words))


def inside(words: list[str], text: str, known: Known) -> Way:
    """A command of b2ray that is the same on every page."""
    return Way(shlex.join(words), inside=True, key=shlex.join(words))


def inside_again(words: list[str], text: str, known: Known) -> Way:
    """A command of b2ray that is run every time: other commands need what it writes."""
    return Way(shlex.join(words), inside=True)


def training(words: list[str], text: str, known: Known) -> Way:
    """`python -m b2ray.run …` or `b2ray run …`, on small models."""
    at = 2 if words[0] == "b2ray" else words.index("b2ray.run") + 1
    if {"--help", "--print-config"} & {*words}:
        return inside(words, text, known)
    argv, key, name = known.shorten(words[at:])
    text = shlex.join([*words[:at], *argv])
    if "--resume" in argv:
        return Way(text, inside=True, unfinished=name)
    return Way(text, inside=True, key=f"run {key}", fresh=name)


def checking(words: list[str], text: str, known: Known) -> Way:
    """`b2ray check …`, on small models; where the interval starts is measured on few pictures."""
    measured = [word for word in words if word.startswith(("--variance", "--calls"))]
    argv = [word for word in words[2:] if word not in measured]
    if any(word.startswith("--variance") for word in measured):
        argv += ["--sampling.steps=3", "--objective.step_weights=none", "--branching.branches=2"]
    argv, key, _ = known.shorten(argv)
    text = shlex.join([*words[:2], *argv, *measured])
    return Way(text, inside=True, key=f"check {key} {measured}")


def submitting(words: list[str], text: str, known: Known) -> Way:
    """`ray job submit … -- python -m b2ray.run …`; the same options need no second job."""
    at = words.index("--") + 1
    options = shlex.join(words[:at])
    inner = training(words[at:], "", known)
    if options in known.done:
        return inner
    known.done.add(options)
    return Way(f"{options} {inner.text}", fresh=inner.fresh)


def listing(words: list[str], text: str, known: Known) -> Way:
    """`ray job list`."""
    return Way(text)


def with_job(words: list[str], text: str, known: Known) -> Way:
    """A command that names a job."""
    return Way(text.replace(" ID", f" {known.job}"))


def making_a_token(words: list[str], text: str, known: Known) -> Way:
    """`ray get-auth-token --generate`, as where no cluster's token is known yet."""
    return Way(f"env --unset RAY_AUTH_TOKEN_PATH --unset RAY_AUTH_MODE {shlex.join(words)}")


def evaluating(words: list[str], text: str, known: Known) -> Way:
    """`b2ray evaluate …`; the run that is held against `mine` is its copy, and all have a stage.

    `mine` may have one stage only: then its stage 1 is its end, and would be given twice.
    """
    short = " ".join(words).replace("--stage 12", "--stage 1").replace("mine mine", "mine other")
    other = "rm -rf runs/other && cp -r runs/mine runs/other" if " other" in short else ""
    return Way(short, inside=True, before=other, key=short)


def watching(words: list[str], text: str, known: Known) -> Way:
    """`b2ray watch`, at a free port."""
    port = known.port()
    return Way(f"exec {shlex.join(words)} --port={port}", serves=f"http://127.0.0.1:{port}/")


def ui(words: list[str], text: str, known: Known) -> Way:
    """`make ui`, at a free port."""
    port = known.port()
    serves = f"http://127.0.0.1:{port}/"
    return Way(f"exec make ui PORT={port}", serves=serves, key="make ui")


def demo(words: list[str], text: str, known: Known) -> Way:
    """`make demo` with a short run's fields."""
    argv, _, name = known.shorten(["--config", "configs/quickstart.yaml", "--name=mine"])
    more = shlex.join(argv[2:])
    return Way(f"make demo ARGS={shlex.quote(more)}", key="make demo", fresh=name)


def tracking(words: list[str], text: str, known: Known) -> Way:
    """`mlflow server …`, at a free port."""
    port = known.port()
    return Way(f"exec {shlex.join(words)} --port={port}", serves=f"http://127.0.0.1:{port}/")


def nodes(words: list[str], text: str, known: Known) -> Way:
    """`cluster/local.py`: the session's cluster is started and stopped by the sandbox."""
    if words[-1] == "stop":
        return Way(":")
    status = f"python cluster/local.py status --state {known.state}"
    return Way(f'eval "$({status})"' if words[0] == "eval" else status)


RULES: dict[str, Rule] = {
    "python -m b2ray.run": training,
    "b2ray run": training,
    "b2ray check": checking,
    "b2ray evaluate": evaluating,
    "b2ray sample": inside,
    "b2ray export": inside_again,
    "b2ray report": inside,
    "b2ray watch": watching,
    "python -m b2ray.shapes.demonstrations": as_it_is,
    "python -m benchmarks.costs": once,
    "python cluster/local.py": nodes,
    "eval $(python cluster/local.py": nodes,
    "ray job submit": submitting,
    "ray job list": listing,
    "ray job status": with_job,
    "ray job logs": with_job,
    "ray job stop": with_job,
    "ray get-auth-token": making_a_token,
    "make demo": demo,
    "make env": as_it_is,
    "make ui": ui,
    "mlflow server": tracking,
    "source .venv/bin/activate": as_it_is,
    "export HF_HUB_OFFLINE=1": as_it_is,
    "printf": as_it_is,
    "sed": as_it_is,
    "chmod": as_it_is,
}

ON_CLUSTER = {nodes, submitting, listing, with_job}
SERVERS = {watching, ui, tracking}


def needs_cluster(words: Sequence[str]) -> bool:
    """Whether a command is about the cluster of two nodes."""
    return rule(words) in ON_CLUSTER


def starts_processes(words: Sequence[str]) -> bool:
    """Whether a command starts a cluster, a server, or a run in a process of its own."""
    return rule(words) in {*ON_CLUSTER, *SERVERS, demo}


def rule(words: Sequence[str]) -> Rule | None:
    """The rule of a command, by the most of its first words that have one."""
    said = shlex.join(words).replace("'", "")
    found = [key for key in RULES if f"{said} ".startswith((f"{key} ",))]
    return RULES[max(found, key=len)] if found else None


def named_files(text: str) -> list[str]:
    """What a command names of the repository, as paths or patterns."""
    tops = "b2ray|benchmarks|cluster|configs|deploy|docs|tests|tools"
    return re.findall(rf"(?<![\w/.-])(?:{tops})/[\w./*-]*[\w*]", text)


def missing(text: str, root: Path) -> list[str]:
    """Those of them that are not there; a word in capitals is for the reader to replace."""
    named = [name for name in named_files(text) if not re.search(r"/[A-Z]{3,}\b", name)]
    return [name for name in named if not list(root.glob(name))]
