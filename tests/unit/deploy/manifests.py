"""The files of deploy/ as data, and the published schemas that they are held against."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
# Which schema file speaks for an apiVersion.
GROUPS = {
    "ray.io/v1": "kuberay",
    "monitoring.coreos.com/v1": "prometheus",
    "v1": "kubernetes",
    "apps/v1": "kubernetes",
    "networking.k8s.io/v1": "kubernetes",
}


@cache
def registry() -> Registry:
    found = {file.name: json.loads(file.read_text()) for file in SCHEMAS.glob("*.json")}
    pairs = [(n, Resource.from_contents(s, DRAFT202012)) for n, s in found.items()]
    return Registry().with_resources(pairs)


def problems(manifest: dict[str, Any]) -> list[str]:
    """What the published schema has against a manifest: place and reason of each fault."""
    file = GROUPS[manifest["apiVersion"]]
    schema = {"$ref": f"{file}.json#/$defs/{manifest['kind']}"}
    errors = Draft202012Validator(schema, registry=registry()).iter_errors(manifest)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in errors]


@cache
def documents(name: str) -> tuple[dict[str, Any], ...]:
    """The objects of a file of deploy/."""
    return tuple(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def manifests() -> dict[str, dict[str, Any]]:
    """Every Kubernetes object of deploy/, by file and kind."""
    found = {}
    for file in sorted(DEPLOY.rglob("*.yaml")):
        for document in documents(str(file.relative_to(DEPLOY))):
            if "kind" in document:
                name = document["metadata"]["name"]
                found[f"{file.stem}/{document['kind']}/{name}"] = document
    return found


def pod_specs(value: Any) -> list[dict[str, Any]]:
    """Every pod specification inside an object: what has containers."""
    if isinstance(value, list):
        return [pod for v in value for pod in pod_specs(v)]
    if not isinstance(value, dict):
        return []
    if "containers" in value:
        return [value]
    return [pod for v in value.values() for pod in pod_specs(v)]


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{package}==")).partition("==")[2]
