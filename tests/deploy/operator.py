"""What the KubeRay operator accepts: names of fields, and the rules that it checks beyond them.

Rules: ray-operator/controllers/ray/utils/validation.go of KubeRay (Apache-2.0), as of August 2026, in words of our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

JOB_FIELDS = {
    *(
        "activeDeadlineSeconds",
        "backoffLimit",
        "clusterSelector",
        "deletionStrategy",
        "entrypoint",
        "entrypointNumCpus",
    ),
    *("entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds"),
    *("rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig"),
    *("submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
}
CLUSTER_FIELDS = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "managedBy", "networkPolicy", "rayVersion", "suspend", "tlsOptions", "upgradeStrategy"),
    "workerGroupSpecs",
}
GROUP_FIELDS = {"rayStartParams", "template", "labels", "resources"}
HEAD_FIELDS = GROUP_FIELDS | {"serviceType", "headService", "enableIngress"}
WORKER_FIELDS = GROUP_FIELDS | {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds", "priority"),
    *("scaleStrategy", "suspend"),
}
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}


def cluster_spec(target: Object) -> Object:
    """The RayCluster's part of a RayJob or RayCluster."""
    spec: Object = target["spec"]
    return spec["rayClusterSpec"] if target["kind"] == "RayJob" else spec  # type: ignore[no-any-return]


def groups(target: Object) -> list[Object]:
    """Head and worker groups."""
    spec = cluster_spec(target)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def problems(target: Object) -> Iterator[str]:
    """What the operator, or the API server, would refuse."""
    name = target["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        yield f"name {name!r} is not one of DNS"
    if target["kind"] == "RayJob":
        yield from _of_job(target["spec"])
    yield from _of_cluster(cluster_spec(target))


def _of_job(spec: Object) -> Iterator[str]:
    yield from (f"no field {key}" for key in set(spec) - JOB_FIELDS)
    if (mode := spec.get("submissionMode", "K8sJobMode")) not in SUBMISSION_MODES:
        yield f"submissionMode {mode}"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend without shutdownAfterJobFinishes"
    if "ttlSecondsAfterFinished" in spec and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if "deletionStrategy" in spec and (spec.get("shutdownAfterJobFinishes") or "ttlSecondsAfterFinished" in spec):
        yield "deletionStrategy beside shutdownAfterJobFinishes"
    if ("clusterSelector" in spec or mode == "InteractiveMode") and spec.get("backoffLimit"):
        yield "backoffLimit on a cluster that is not the job's own"
    if not isinstance(json.loads(spec.get("entrypointResources", "{}")), dict):
        yield "entrypointResources is no JSON object"
    if spec["rayClusterSpec"].get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth in a RayJob"


def _of_cluster(spec: Object) -> Iterator[str]:
    yield from (f"no field {key}" for key in set(spec) - CLUSTER_FIELDS)
    yield from (f"no field headGroupSpec.{key}" for key in set(spec["headGroupSpec"]) - HEAD_FIELDS)
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    if len(set(names)) < len(names):
        yield f"groups of one name: {names}"
    for group in spec["workerGroupSpecs"]:
        yield from (f"no field workerGroupSpecs.{key}" for key in set(group) - WORKER_FIELDS)
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"replicas of {group['groupName']} out of range"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        if "resources" in group and "resources" in group.get("rayStartParams", {}):
            yield "resources said twice"
        if "labels" in group.get("rayStartParams", {}):
            yield "labels among rayStartParams"
        if not all(isinstance(value, str) for value in group.get("rayStartParams", {}).values()):
            yield "a value of rayStartParams is no text"
    yield from _of_options(spec)


def _of_options(spec: Object) -> Iterator[str]:
    auth = spec.get("authOptions", {})
    if auth.get("mode") == "token" and _version(spec.get("rayVersion", "0")) < (2, 52):
        yield "token without a rayVersion of at least 2.52"
    if auth.get("mode") not in (None, "token", "disabled"):
        yield f"authOptions.mode {auth['mode']}"
    environment = {
        e["name"] for g in _groups(spec) for c in g["template"]["spec"]["containers"] for e in c.get("env", [])
    }
    options = spec.get("autoscalerOptions", {})
    if options and not spec.get("enableInTreeAutoscaling"):
        yield "autoscalerOptions without enableInTreeAutoscaling"
    if "version" in options and "RAY_enable_autoscaler_v2" in environment:
        yield "the autoscaler's version said twice"
    if spec.get("enableInTreeAutoscaling"):
        policies = {group["template"]["spec"].get("restartPolicy", "Never") for group in _groups(spec)}
        if policies != {"Never"}:
            yield f"autoscaler v2 with restartPolicy {policies}"
    if "gcsFaultToleranceOptions" in spec:
        if clash := environment & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "RAY_external_storage_namespace"}:
            yield f"{clash} beside gcsFaultToleranceOptions"
        if any("redis-password" in group.get("rayStartParams", {}) for group in _groups(spec)):
            yield "redis-password beside gcsFaultToleranceOptions"


def _groups(spec: Object) -> list[Object]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
