"""deploy/kuberay as `kubectl apply -k` would send it: accepted by the operator, closed, without secrets, large enough."""

from __future__ import annotations

import copy
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cluster.capacity.room import Demand
from cluster.spec.config import load_config
from tests.deploy.kustomize import Object, apply, build
from tests.deploy.operator import cluster_spec, groups, problems
from tests.deploy.schemas.reduce import REDUCED, reduced
from tests.fakes.published_models import MODELS
from tests.places import REPOSITORY

KUBERAY = REPOSITORY / "deploy" / "kuberay"
OVERLAYS = {path.name: path for path in sorted((KUBERAY / "overlays").iterdir())}
JOBS = ["one_gpu", "eight_gpus", "several_nodes", "own_token", "kueue"]
CLUSTERS = ["autoscaling", "head_fault_tolerance", "spot"]
EACH = pytest.mark.parametrize("overlay", OVERLAYS)
CRDS = os.environ.get("KUBERAY_CRDS")


@cache
def built(overlay: str) -> list[Object]:
    return build(OVERLAYS[overlay])


def ray(overlay: str) -> Object:
    """The one RayJob or RayCluster of an overlay."""
    (found,) = [o for o in built(overlay) if o["apiVersion"].startswith("ray.io/")]
    return found


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [o for o in built(overlay) if o["kind"] == kind]


def pods(overlay: str) -> list[Object]:
    """Every pod template."""
    others = [o["spec"]["template"] for o in of_kind(overlay, "StatefulSet")]
    return [*(group["template"] for group in groups(ray(overlay))), *others]


def containers(overlay: str) -> list[Object]:
    return [c for pod in pods(overlay) for c in pod["spec"]["containers"]]


def fails(**changes: Any) -> list[str]:
    """The problems of one_gpu with paths of its spec (dots become levels) set to other values."""
    target = copy.deepcopy(ray("one_gpu"))
    for path, value in changes.items():
        *above, last = path.split("__")
        place = target["spec"]
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return list(problems(target))


# --- the builder ---------------------------------------------------------------------------------------------------


def test_a_patch_adds_replaces_and_removes_and_one_that_hits_nothing_is_an_error() -> None:
    target: Object = {"a": [{"b/c": 1}], "d": 2}
    apply(target, {"op": "replace", "path": "/a/0/b~1c", "value": 3})
    apply(target, {"op": "add", "path": "/a/-", "value": 4})
    apply(target, {"op": "remove", "path": "/d"})
    assert target == {"a": [{"b/c": 3}, 4]}
    for operation in ({"op": "replace", "path": "/x", "value": 1}, {"op": "add", "path": "/x/y", "value": 1}):
        with pytest.raises(ValueError, match="nothing"):
            apply(target, operation)


def test_every_case_has_an_overlay() -> None:
    assert sorted(OVERLAYS) == sorted(JOBS + CLUSTERS)
    assert {ray(name)["kind"] for name in JOBS} == {"RayJob"}
    assert {ray(name)["kind"] for name in CLUSTERS} == {"RayCluster"}


def test_a_job_and_a_cluster_have_the_same_workers() -> None:
    job, cluster = (cluster_spec(next(o for o in build(KUBERAY / name) if "spec" in o and o["kind"].startswith("Ray")))
                    for name in ("job", "cluster"))  # fmt: skip
    assert job["workerGroupSpecs"] == cluster["workerGroupSpecs"]
    assert {key: job[key] for key in job if "Group" not in key} == {
        key: cluster[key] for key in cluster if "Group" not in key
    }


def test_no_yaml_has_anchors_which_patches_would_change_in_two_places() -> None:
    for path in KUBERAY.rglob("*.yaml"):
        assert not re.search(r"(^|[\s:])[&*][a-z_]+\s*$", path.read_text(), re.MULTILINE), path


# --- what the operator accepts -------------------------------------------------------------------------------------


@EACH
def test_the_operator_accepts_it(overlay: str) -> None:
    assert list(problems(ray(overlay))) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shutdownAfterJobFinish": True}, "no field shutdownAfterJobFinish"),
        ({"submissionMode": "HttpMode"}, "submissionMode HttpMode"),
        ({"shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished without"),
        ({"deletionStrategy": {}}, "deletionStrategy beside"),
        ({"clusterSelector": {"a": "b"}}, "backoffLimit on a cluster"),
        ({"rayClusterSpec__rayVersion": "2.51.0"}, "token without a rayVersion"),
        ({"rayClusterSpec__autoscalerOptions": {"version": "v2"}}, "autoscalerOptions without"),
        ({"rayClusterSpec__headGroupSpec__template__spec__restartPolicy": "Always",
          "rayClusterSpec__enableInTreeAutoscaling": True}, "autoscaler v2 with restartPolicy"),
    ],
)  # fmt: skip
def test_what_the_operator_refuses_is_found(changes: dict[str, Any], problem: str) -> None:
    assert [found for found in fails(**changes) if problem in found]


@cache
def schemas() -> dict[str, Any]:
    """The operator's own: those that KUBERAY_CRDS names, else those that are shipped."""
    return reduced(Path(CRDS)) if CRDS else json.loads(REDUCED.read_text())


def schema(kind: str) -> Any:
    """A validator of a kind, closed: a field that the operator does not name is an error."""
    return jsonschema.Draft202012Validator(schemas() | {"$ref": f"#/$defs/{kind}"})


@EACH
def test_it_has_the_form_of_the_operators_published_schema(overlay: str) -> None:
    target = ray(overlay)
    assert [(list(e.absolute_path), e.message) for e in schema(target["kind"]).iter_errors(target)] == []
    target = copy.deepcopy(target)
    cluster_spec(target)["headGroupSpec"]["template"]["spec"]["container"] = []
    assert [e.message for e in schema(target["kind"]).iter_errors(target)] != []


# --- closed --------------------------------------------------------------------------------------------------------


@EACH
def test_nobody_reaches_ray_without_the_token_and_from_nowhere_but_where_it_is_needed(overlay: str) -> None:
    spec = cluster_spec(ray(overlay))
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert {o["kind"] for o in built(overlay)}.isdisjoint({"Ingress", "Route"})
    (policy,) = [o["spec"] for o in of_kind(overlay, "NetworkPolicy") if o["metadata"]["name"] == "align"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule["from"] for rule in policy["ingress"])
    outside = [rule for rule in policy["ingress"] if "namespaceSelector" in rule["from"][0]]
    assert [[port["port"] for port in rule["ports"]] for rule in outside] == [[8265], [8080]]
    assert {port["port"] for rule in policy["egress"] for port in rule.get("ports", [])} <= {53, 443, 6443, 6379}


@EACH
def test_every_pod_is_under_the_policy_and_runs_without_privileges(overlay: str) -> None:
    policies = [o["spec"]["podSelector"]["matchLabels"] for o in of_kind(overlay, "NetworkPolicy")]
    for pod in pods(overlay):
        assert pod["metadata"]["labels"] in policies
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"])
    for container in containers(overlay):
        assert container["securityContext"] == container["securityContext"] | {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@EACH
def test_no_pod_but_an_autoscaling_head_gets_an_account_of_kubernetes(overlay: str) -> None:
    head, *others = (pod["spec"].get("automountServiceAccountToken", True) for pod in pods(overlay))
    assert head == cluster_spec(ray(overlay)).get("enableInTreeAutoscaling", False)
    assert not any(others)


@EACH
def test_secrets_come_by_reference_and_no_value_is_written_down(overlay: str) -> None:
    assert of_kind(overlay, "Secret") == []
    for container in containers(overlay):
        for variable in container.get("env", []):
            secret = re.search(r"KEY|TOKEN|SECRET|PASSWORD", variable["name"])
            assert (secret is None) == ("value" in variable)
    keys = [v["valueFrom"]["secretKeyRef"] for c in containers(overlay) for v in c.get("env", []) if "valueFrom" in v]
    assert {"name": "align-wandb", "key": "api-key", "optional": True} in keys
    assert not re.search(r"KEY|TOKEN|PASSWORD", ray(overlay)["spec"].get("runtimeEnvYAML", ""))


# --- large enough --------------------------------------------------------------------------------------------------


@EACH
def test_requests_are_limits_so_that_ray_and_kubernetes_count_the_same(overlay: str) -> None:
    for group in groups(ray(overlay)):
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


@EACH
def test_where_the_controller_runs_there_is_the_storage_and_the_key(overlay: str) -> None:
    head, first, *others = groups(ray(overlay))
    assert json.loads(json.loads(first["rayStartParams"]["resources"])) == {"driver": 1}
    assert not any("resources" in group["rayStartParams"] for group in (head, *others))
    where = [first] if ray(overlay)["kind"] == "RayJob" else [head, first]
    for group in where:
        (container,) = group["template"]["spec"]["containers"]
        assert "WANDB_API_KEY" in {variable["name"] for variable in container["env"]}
    for group in (*where, *others):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
        claims = [volume["persistentVolumeClaim"]["claimName"] for volume in group["template"]["spec"]["volumes"]]
        assert claims == [o["metadata"]["name"] for o in of_kind(overlay, "PersistentVolumeClaim")]


@pytest.mark.parametrize("overlay", JOBS)
def test_the_run_of_a_job_is_in_the_image_resumes_from_the_storage_and_finds_room(overlay: str) -> None:
    spec = ray(overlay)["spec"]
    words = spec["entrypoint"].split()
    assert words[:2] == ["align", "train"] and words[2].startswith("/app/deploy/runs/")
    assert words[3] == "--set" and words[4].startswith("run.dir=/shared/runs/")
    assert json.loads(spec["entrypointResources"]) == {"driver": 1}
    run_dir = words[4].removeprefix("run.dir=")
    assert spec["metadata"] == {"align_run": load_config(REPOSITORY / words[2][5:]).run.name, "align_run_dir": run_dir}
    demand = Demand.of(load_config(REPOSITORY / words[2].removeprefix("/app/")))
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert demand.num_gpus <= group["minReplicas"] * int(limits["nvidia.com/gpu"])
    assert demand.num_cpus <= group["minReplicas"] * int(limits["cpu"])


@pytest.mark.parametrize("overlay", JOBS)
def test_the_storage_has_room_for_the_checkpoints_of_the_run(overlay: str) -> None:
    cfg = load_config(REPOSITORY / ray(overlay)["spec"]["entrypoint"].split()[2].removeprefix("/app/"))
    num_parameters = MODELS[cfg.policy.model.name][1] * 1e9
    (claim,) = of_kind(overlay, "PersistentVolumeClaim")
    size = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Ti")) * 2**40
    assert ((cfg.checkpoint.keep + 1) * 12 + 4 + 4) * num_parameters < size


def test_spot_machines_get_rollout_actors_and_never_the_learner() -> None:
    learner, rollout = cluster_spec(ray("spot"))["workerGroupSpecs"]
    (label,) = rollout["template"]["spec"]["nodeSelector"]
    avoided = learner["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert avoided["nodeSelectorTerms"] == [{"matchExpressions": [{"key": label, "operator": "DoesNotExist"}]}]
    assert (learner["minReplicas"], rollout["minReplicas"]) == (1, 0)


def test_redis_has_the_password_that_ray_is_given_and_keeps_its_data() -> None:
    options = cluster_spec(ray("head_fault_tolerance"))["gcsFaultToleranceOptions"]
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    (redis,) = of_kind("head_fault_tolerance", "StatefulSet")
    volumes = redis["spec"]["template"]["spec"]["volumes"]
    assert {"name": "secret", "secret": {"secretName": secret["name"]}} in volumes
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert f"/secret/{secret['key']}" in container["args"][0] and "appendonly yes" in container["args"][0]
    (service,) = of_kind("head_fault_tolerance", "Service")
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def test_kueue_gets_a_job_that_it_may_suspend() -> None:
    target = ray("kueue")
    assert target["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "align"
    assert target["spec"]["suspend"] and target["spec"]["shutdownAfterJobFinishes"]


@EACH
def test_the_command_that_starts_it_is_in_its_file_and_in_the_guide(overlay: str) -> None:
    command = f"kubectl apply -n align -k deploy/kuberay/overlays/{overlay}"
    assert f"#   {command}\n" in (OVERLAYS[overlay] / "kustomization.yaml").read_text()
    assert command in (REPOSITORY / "deploy" / "README.md").read_text()
