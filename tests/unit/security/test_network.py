"""Who can speak to Ray and MLflow: token authentication everywhere, nothing open to the world."""

from __future__ import annotations

import re
from typing import Any

import yaml

from b2ray.config.paths import PACKAGE
from tests.unit.deploy.manifests import ROOT, documents, manifests, pod_specs

LAUNCHERS = [*ROOT.glob("cluster/*.yaml"), *ROOT.glob("cluster/*.sh")]
FILES = sorted([*LAUNCHERS, *ROOT.glob("deploy/**/*.yaml")])
SCRIPTS = sorted(
    [*FILES, *PACKAGE.rglob("*.py"), ROOT / "Makefile", ROOT / "deploy" / "Dockerfile"]
)
STARTS_RAY = re.compile(r"\bray[\"', ]+start\b|^kind: Ray(Cluster|Job)$", re.M)
TOKEN_MODE = re.compile(
    r"RAY_AUTH_MODE[\"']?\s*[=:,]\s*[\"']?token\b|authOptions:\s*\{?\s*mode:\s*token\b"
)
NAMES = [str(f.relative_to(ROOT)) for f in FILES]
FORBIDDEN = {
    "authentication is turned off": re.compile(
        r"RAY_AUTH_MODE[\"']?\]?\s*[=:,]\s*[\"']?disabled|mode:\s*disabled"
    ),
    # Letters and digits after the name are a token; $, a call or a path are not.
    "a token is written down": re.compile(r"RAY_AUTH_TOKEN[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9]{8,}"),
}


def text_of(name: str) -> str:
    """A file without its comments."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def test_whoever_starts_ray_asks_for_a_token():
    starting = [name for name in NAMES if STARTS_RAY.search(text_of(name))]
    assert {"deploy/rayjob.yaml", "deploy/raycluster.yaml"} <= {*starting}
    without_token = [name for name in starting if not TOKEN_MODE.search(text_of(name))]
    assert without_token == [], "neither RAY_AUTH_MODE=token nor authOptions"


def faults(text: str) -> list[str]:
    return [fault for fault, pattern in FORBIDDEN.items() if pattern.search(text)]


def test_the_scan_sees_what_is_forbidden_and_nothing_else():
    off, token = [["authentication is turned off"], ["a token is written down"]]
    expected = {
        "export RAY_AUTH_MODE=disabled": off,
        'os.environ["RAY_AUTH_MODE"] = "disabled"': off,
        'environ.setdefault("RAY_AUTH_MODE", "disabled")': off,
        "authOptions:\n  mode: disabled": off,
        "RAY_AUTH_TOKEN=0123456789abcdef": token,
        "RAY_AUTH_TOKEN: 'abcdefgh'": token,
        "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$TOKEN": [],
        "RAY_AUTH_TOKEN=$(cat token)": [],
    }
    assert {text: faults(text) for text in expected} == expected


def test_nobody_turns_authentication_off_or_writes_a_token_down():
    names = [str(file.relative_to(ROOT)) for file in SCRIPTS]
    assert {*NAMES, "Makefile", "b2ray/run.py"} <= {*names}
    assert {name: faults(text_of(name)) for name in names if faults(text_of(name))} == {}


def test_launchers_keep_the_dashboard_on_loopback():
    hosts = {
        (name, host)
        for name in NAMES
        if name.startswith("cluster/")
        for host in re.findall(r"dashboard-host[\"']?[=:, ]+[\"']?([\w.:$]+)", text_of(name))
    }
    assert hosts
    assert {h for h in hosts if h[1] not in ("127.0.0.1", "localhost", "::1")} == set()


def covers(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


POLICIES = [d for d in documents("networkpolicy.yaml") if d["kind"] == "NetworkPolicy"]


def templates(value: Any) -> list[dict[str, Any]]:
    """Every pod template inside an object."""
    if isinstance(value, list):
        return [found for v in value for found in templates(v)]
    if not isinstance(value, dict):
        return []
    if "metadata" in value and "containers" in value.get("spec", {}):
        return [value]
    return [found for v in value.values() for found in templates(v)]


def test_every_pod_is_behind_a_policy():
    count = 0
    for manifest in manifests().values():
        found = templates(manifest)
        assert len(found) == len(pod_specs(manifest))
        for template in found:
            labels = template["metadata"]["labels"]
            policies = [p for p in POLICIES if covers(p, labels)]
            assert policies, labels
            assert all("Ingress" in p["spec"]["policyTypes"] for p in policies)
            count += 1
    assert count >= 7


def test_the_policies_let_in_only_who_has_business_there():
    """The dashboard's and the job server's port is for the pods themselves and the operator."""
    for policy in POLICIES:
        for rule in policy["spec"]["ingress"]:
            assert rule["from"], "an empty list is everybody"
            for peer in rule["from"]:
                assert "ipBlock" not in peer
                assert peer["podSelector"]["matchLabels"], "every pod of a namespace"
    allowed = {
        tuple(peer["podSelector"]["matchLabels"].values()): [
            p["port"] for p in rule.get("ports", [])
        ]
        for policy in POLICIES
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        if "namespaceSelector" in peer
    }
    assert allowed == {("kuberay-operator",): [8265], ("prometheus",): [8080]}


def test_no_service_is_exposed():
    for name, manifest in manifests().items():
        assert manifest["kind"] not in ("Ingress", "Gateway", "HTTPRoute"), name
        if manifest["kind"] == "Service":
            assert manifest["spec"]["type"] == "ClusterIP"
        for pod in pod_specs(manifest):
            assert not pod.get("hostNetwork")
            for container in pod["containers"]:
                assert not [p for p in container.get("ports", []) if "hostPort" in p]
    spec = documents("raycluster.yaml")[0]["spec"]
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")


def test_mlflow_is_asked_for_by_its_own_names():
    command = documents("mlflow.yaml")[2]["spec"]["template"]["spec"]["containers"][0]["command"]
    hosts = next(w for w in command if w.startswith("--allowed-hosts=")).partition("=")[2]
    assert "*" not in hosts and "mlflow:5000" in hosts.split(",")
    assert "--disable-security-middleware" not in command


def test_on_one_machine_mlflow_and_ray_stay_on_loopback():
    makefile = (ROOT / "Makefile").read_text()
    for line in makefile.splitlines():
        if re.search(r"mlflow (ui|server)", line):
            assert "--host 127.0.0.1" in line
    session = (PACKAGE / "fleet" / "session.py").read_text()
    assert "include_dashboard=False" in session
    for file in PACKAGE.rglob("*.py"):
        assert "0.0.0.0" not in file.read_text(encoding="utf-8"), file


def test_the_manifests_are_plain_yaml():
    for file in FILES:
        if file.suffix == ".yaml":
            assert list(yaml.safe_load_all(file.read_text(encoding="utf-8")))
