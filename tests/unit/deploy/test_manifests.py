"""deploy/ against the schemas of Kubernetes, KubeRay and the Prometheus operator, against the
versions in constraints.txt, and against what a run needs."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

import pytest
import yaml

import b2ray
from b2ray.config.load import parse
from b2ray.tracking.mlflow.log import FINISH_WITHIN
from tests.unit.deploy.manifests import (
    DEPLOY,
    ROOT,
    documents,
    manifests,
    pinned,
    pod_specs,
    problems,
)

ALL = manifests()
RAY = {name: found for name, found in ALL.items() if found["apiVersion"] == "ray.io/v1"}
CLUSTER = documents("raycluster.yaml")[0]["spec"]
JOB = documents("rayjob.yaml")[0]["spec"]
RUNTIME_ENV = yaml.safe_load(JOB["runtimeEnvYAML"])
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def size(quantity: str) -> int:
    """Bytes of a quantity such as 6Gi."""
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def groups() -> dict[str, dict[str, Any]]:
    """The head's and the workers' groups by name."""
    return {"head": CLUSTER["headGroupSpec"]} | {
        g["groupName"]: g for g in CLUSTER["workerGroupSpecs"]
    }


@pytest.mark.parametrize("name", ALL)
def test_an_object_obeys_the_published_schema(name):
    assert problems(ALL[name]) == []


def test_every_kind_is_there():
    kinds = {found["kind"] for found in ALL.values()}
    assert kinds >= {"RayJob", "RayCluster", "NetworkPolicy", "PodMonitor", "Deployment"}


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("rayjob/RayJob/b2ray", ["spec", "backoffLimits"], 3),
        ("rayjob/RayJob/b2ray", ["spec", "backoffLimit"], "3"),
        ("raycluster/RayCluster/b2ray", ["spec", "authOptions", "mode"], "on"),
        ("raycluster/RayCluster/b2ray", ["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (
            "raycluster/RayCluster/b2ray",
            ["spec", "workerGroupSpecs", 0, "template", "spec", "toleration"],
            [],
        ),
        ("networkpolicy/NetworkPolicy/b2ray", ["spec", "ingress", 0, "form"], []),
        ("mlflow/Deployment/mlflow", ["spec", "replicas"], "one"),
        ("mlflow/Service/mlflow", ["spec", "typ"], "ClusterIP"),
        ("prometheus/PodMonitor/b2ray", ["spec", "podMetricsEndpoints", 0, "interval"], "soon"),
        ("prometheus/PrometheusRule/b2ray", ["spec", "groups", 0, "rules", 0, "alerts"], "x"),
    ],
)
def test_the_schemas_see_a_slip(name, path, value):
    broken = copy.deepcopy(ALL[name])
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert problems(broken)


def test_versions_are_the_pinned_ones():
    assert CLUSTER["rayVersion"] == pinned("ray")
    images = {c["image"] for found in ALL.values() for p in pod_specs(found) for c in containers(p)}
    assert images == {f"b2ray:{b2ray.__version__}"}  # with the pinned packages, MLflow's too
    labels = documents("mlflow.yaml")[2]["spec"]["template"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/version"] == pinned("mlflow")
    assert f"b2ray:{b2ray.__version__} ." in (DEPLOY / "Dockerfile").read_text()


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["containers"], *pod.get("initContainers", [])]


@pytest.mark.parametrize(
    "page", ["docs/howto/cluster.md", "docs/explanation/security.md", "deploy/README.md"]
)
def test_what_the_guides_name_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:deploy|docs|tests/unit)/[\w./-]*\w", text))
    if page.startswith("deploy/"):
        named |= {f"deploy/{n}" for n in re.findall(r"`(\w+\.(?:yaml|json))`", text)}
        # And the other way round: every file has its line.
        files = {f"deploy/{f.name}" for f in DEPLOY.iterdir() if f.suffix in (".yaml", ".json")}
        assert files <= named
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_a_job_and_a_cluster_are_the_same_cluster():
    assert JOB["rayClusterSpec"] == CLUSTER


def test_the_job_is_a_command_that_resumes():
    python, flag, module, *argv = shlex.split(JOB["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "b2ray.run")
    config = parse(argv).config
    mounts = {
        m["mountPath"]: m["name"]
        for m in CLUSTER["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    volumes = {v["name"]: v for v in CLUSTER["headGroupSpec"]["template"]["spec"]["volumes"]}
    claim = volumes[mounts[config.runs]]["persistentVolumeClaim"]["claimName"]
    assert claim == documents("storage.yaml")[0]["metadata"]["name"]
    # A refused configuration is retried like anything else: not often.
    assert 0 < JOB["backoffLimit"] <= 5
    assert JOB["shutdownAfterJobFinishes"] is True


def test_the_actors_of_the_job_fit_into_its_smallest_cluster():
    config = parse(shlex.split(JOB["entrypoint"])[3:]).config
    fleet = config.fleet
    wanted = [fleet.learner.gpus]
    wanted += [fleet.samplers.gpus] * fleet.samplers.min
    wanted += [fleet.scorers.gpus] * fleet.scorers.count
    free = []
    for group in CLUSTER["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
        free += [float(gpus)] * group["minReplicas"]
    for need in sorted(wanted, reverse=True):
        host = next((i for i, left in enumerate(free) if left >= need), None)
        assert host is not None, f"no GPU for {need}"
        free[host] -= need


def test_there_is_time_to_stop():
    wait = int(RUNTIME_ENV["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    head = CLUSTER["headGroupSpec"]["template"]["spec"]
    assert FINISH_WITHIN < wait < head["terminationGracePeriodSeconds"]
    # A string: Ray refuses numbers in env_vars.
    assert isinstance(RUNTIME_ENV["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"], str)
    *_, script = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    compile(script, "preStop", "exec")
    for group in CLUSTER["workerGroupSpecs"]:
        # The shortest notice that a cloud gives a spot node.
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] < 30


def test_the_runtime_environments_are_ones_for_ray():
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**RUNTIME_ENV)
    (given,) = documents("runtime_env.yaml")
    assert given["env_vars"] == RUNTIME_ENV["env_vars"]
    RuntimeEnv(**{**given, "working_dir": str(DEPLOY)})


@pytest.mark.parametrize("name", groups())
def test_the_object_store_fits_into_shared_memory(name):
    group = groups()[name]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    shm = volumes[mounts["/dev/shm"]]["emptyDir"]
    assert shm["medium"] == "Memory"
    store = int(group["rayStartParams"]["object-store-memory"])
    assert store < size(shm["sizeLimit"]) < size(container["resources"]["limits"]["memory"])


def test_the_head_stays_and_samplers_may_go():
    wanted = {
        n: g["template"]["spec"]["nodeSelector"]["b2ray-capacity"] for n, g in groups().items()
    }
    assert wanted == {"head": "on-demand", "steady": "on-demand", "spot": "spot"}
    tolerated = groups()["spot"]["template"]["spec"]["tolerations"]
    assert {"key": "b2ray-capacity", "value": "spot"}.items() <= tolerated[1].items()
    assert groups()["spot"]["maxReplicas"] > groups()["spot"]["minReplicas"] >= 1
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", [n for n, found in ALL.items() if pod_specs(found)])
def test_pods_are_confined_and_bounded(name):
    for pod in pod_specs(ALL[name]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in containers(pod):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
            # No secret stands in a file: they come from a Secret.
            for variable in container.get("env", []):
                words = variable["name"].lower().split("_")
                assert not {"token", "key", "password", "secret"} & {*words}


def test_the_pods_that_are_monitored_have_the_port():
    monitor = documents("prometheus.yaml")[0]["spec"]
    port = monitor["podMetricsEndpoints"][0]["port"]
    for group in groups().values():
        labels = group["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        (container,) = group["template"]["spec"]["containers"]
        ports = {p["name"]: p["containerPort"] for p in container["ports"]}
        assert str(ports[port]) == group["rayStartParams"]["metrics-export-port"]
