"""Makes kubernetes.json and prometheus.json from what is published; for a new version, by hand.

    pip install kubernetes-validate==1.37.0 cloudcoil-models-prometheus-operator==0.80.1.0
    python tests/unit/deploy/schemas/extract.py

kubernetes-validate carries the JSON schemas of Kubernetes' own API, in the strict form that refuses
unknown fields; cloudcoil's models are generated from the Prometheus operator's CRDs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
from cloudcoil.models.prometheus_operator import v1 as prometheus

HERE = Path(__file__).parent
VERSION = "1.37.0"
SOURCE = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
ROOTS = {
    "Deployment": "io.k8s.api.apps.v1.Deployment",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    "Service": "io.k8s.api.core.v1.Service",
    # What KubeRay's own fields hold:
    "Container": "io.k8s.api.core.v1.Container",
    "PodTemplateSpec": "io.k8s.api.core.v1.PodTemplateSpec",
    "ResourceRequirements": "io.k8s.api.core.v1.ResourceRequirements",
    "SecurityContext": "io.k8s.api.core.v1.SecurityContext",
}


def plain(value: Any, properties: bool = False) -> Any:
    """A schema without its prose, its references made local."""
    if isinstance(value, list):
        return [plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, inner in value.items():
        if not properties and (key in ("description", "title") or key.startswith("x-")):
            continue
        if key == "$ref" and isinstance(inner, str):
            inner = "#/$defs/" + inner.rpartition("/")[2]
        kept[key] = plain(inner, properties=key == "properties" and not properties)
    return kept


def references(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(references, value))
    if not isinstance(value, dict):
        return set()
    found = set().union(*map(references, value.values()))
    ref = value.get("$ref")
    return found | {ref.rpartition("/")[2]} if isinstance(ref, str) else found


def kubernetes() -> dict[str, Any]:
    whole = json.loads((SOURCE / f"v{VERSION}-local-strict" / "_definitions.json").read_text())
    defs, wanted = {}, set(ROOTS.values())
    while wanted - defs.keys():
        name = min(wanted - defs.keys())
        defs[name] = plain(whole["$defs"][name])
        wanted |= references(defs[name])
    kinds = {kind: {"$ref": f"#/$defs/{name}"} for kind, name in ROOTS.items()}
    comment = f"Kubernetes {VERSION}, strict; by extract.py from kubernetes-validate {VERSION}"
    return {"$comment": comment, "$defs": {**kinds, **dict(sorted(defs.items()))}}


def operator() -> dict[str, Any]:
    defs: dict[str, Any] = {}
    for model in (prometheus.PodMonitor, prometheus.PrometheusRule):
        schema = plain(model.model_json_schema(by_alias=True))
        for name, inner in schema.pop("$defs").items():
            closed = {"additionalProperties": False} if "properties" in inner else {}
            # Metadata is Kubernetes' own and looked at by its schema.
            defs.setdefault(name, {**inner, **closed})
        schema["properties"]["metadata"] = {"type": "object"}
        schema["properties"].pop("status", None)
        defs[model.__name__] = {**schema, "additionalProperties": False}
    comment = "Prometheus operator 0.80.1; by extract.py from cloudcoil-models-prometheus-operator"
    return {"$comment": comment, "$defs": defs}


if __name__ == "__main__":
    for file, schema in (("kubernetes", kubernetes()), ("prometheus", operator())):
        text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
        (HERE / f"{file}.json").write_text(text + "\n")
