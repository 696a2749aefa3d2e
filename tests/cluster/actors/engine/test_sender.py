"""The learner's side of NCCL and IPC, as far as a machine without a GPU can show it; `sender_probe.py` does the work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from align.model.policy import Policy
from cluster.actors.weights import Link, WeightsConfig, WireWeights, export_weights, fingerprint, inspect
from cluster.faults import TrainingDiverged
from tests.harness.probes import Probe

UPDATE = ["begin_update", "start_weight_update", "update_weights", "finish_weight_update"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the probe saw."""
    return Probe("tests.cluster.actors.engine.sender_probe").answer(timeout_s=300)


@pytest.mark.integration
def test_an_engine_of_several_gpus_starts_its_own_workers_where_vllm_would_ask_ray_for_them(
    found: dict[str, Any],
) -> None:
    """In a placement group vLLM would else take Ray, and the group has no room for its workers."""
    assert found["engines_on_gpus"] == [None, "mp", "mp"]


@pytest.mark.integration
def test_every_worker_of_every_engine_has_a_rank_of_its_own(found: dict[str, Any]) -> None:
    nccl = found["nccl_032"]
    assert nccl["offsets"] == [1, 3, 5], "three engines of two workers each, after the learner"
    assert nccl["worlds"] == [7, 7, 7, 7]
    assert nccl["ports_agree"]


@pytest.mark.integration
def test_learner_and_workers_agree_on_the_buffers(found: dict[str, Any]) -> None:
    assert found["nccl_032"]["packed"] == [[True, 64]] * 3


@pytest.mark.integration
def test_engines_are_asked_whether_they_are_there_before_all_wait_for_all(found: dict[str, Any]) -> None:
    assert found["nccl_032"]["connected"] == ["ready", "init_weight_transfer_engine"]


@pytest.mark.integration
def test_an_update_is_begun_started_sent_and_finished(found: dict[str, Any]) -> None:
    assert found["nccl_032"]["order"] == UPDATE
    assert found["nccl_026"]["order"] == ["ready", "init_weight_transfer_engine", *UPDATE]
    assert found["ipc_026"]["order"] == ["ready", "init_weight_transfer_engine", *UPDATE]
    assert found["ipc_032"]["order"] == ["ready", "init_weight_transfer_engine", *UPDATE]


@pytest.mark.integration
def test_the_bytes_of_all_weights_are_sent_in_the_wire_type_at_every_send(found: dict[str, Any]) -> None:
    assert found["nccl_032"]["bytes_right"]
    assert found["nccl_032"]["num_broadcasts"] > 1, "one buffer held all, packing was not at work"
    assert found["nccl_026"]["bytes_right"]


@pytest.mark.integration
def test_the_engines_are_told_names_types_and_shapes(found: dict[str, Any]) -> None:
    told = {
        "names": ["a.weight", "b.weight", "c.weight"],
        "dtype_names": ["bfloat16"] * 3,
        "shapes": [[2, 3], [300], [5, 2]],
    }
    assert found["nccl_032"]["update"] == told
    packing = {"packed": True, "packed_buffer_size_bytes": 64, "packed_num_buffers": 2}
    assert found["nccl_026"]["update"] == told | packing


@pytest.mark.integration
def test_0_26_gets_only_the_keys_that_it_knows(found: dict[str, Any]) -> None:
    assert found["nccl_026"]["init_keys"] == ["master_address", "master_port", "rank_offset", "world_size"]
    assert found["nccl_026"]["offsets"] == [1, 3]
    assert found["nccl_026"]["worlds"] == [5, 5]
    assert found["ipc_026"]["init"] == {}
    assert found["ipc_032"]["init"] == {"packed": True}


@pytest.mark.integration
def test_a_lost_engine_is_named_and_a_broadcast_that_waits_for_it_is_given_up(found: dict[str, Any]) -> None:
    failures = found["failures_032"]
    assert len(failures) == 6
    for case, (error, rank, _, given_up) in failures.items():
        assert error == "ActorLost", case
        assert rank == 1, case
        assert given_up or case == "fails_in ready", case
    assert found["nccl_026"]["lost"] == [1, True]


@pytest.mark.integration
def test_no_engine_is_taken_apart_before_all_have_stopped(found: dict[str, Any]) -> None:
    failures = found["failures_032"]
    assert failures["fails_in ready"][2] == []
    assert failures["fails_in begin_update"][2] == ["begin_update"]
    assert failures["fails_in start_weight_update"][2] == UPDATE[:2]


@pytest.mark.integration
def test_cuda_handles_travel_as_text_and_the_worker_reads_them(found: dict[str, Any]) -> None:
    ipc = found["ipc_032"]
    assert ipc["only_text_and_numbers"]
    assert ipc["handles_arrive"]
    assert ipc["worker_reads_it"]
    assert ipc["num_updates"] == 3
    assert not found["ipc_026"]["raw_handles_left"]


@pytest.mark.integration
def test_the_ipc_buffer_holds_the_largest_weight_and_in_0_26_all_of_them(found: dict[str, Any]) -> None:
    assert found["ipc_032"]["buffer"] == 600
    assert found["ipc_026"]["buffer"] == 2 * (6 + 300 + 10)
    assert found["ipc_026"]["packed"]


def test_wire_weights_say_in_advance_what_they_yield(policy: Policy) -> None:
    wire = WireWeights(policy.named_weights, "bfloat16", policy.named_shapes)
    yielded = [(name, weight.dtype, tuple(weight.shape)) for name, weight in wire]
    assert [tuple(info) for info in wire.metadata()] == yielded
    assert wire.num_bytes == sum(weight.nbytes for _, weight in wire)
    assert wire.largest_bytes == max(weight.nbytes for _, weight in wire)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_publish_the_same_bytes(policy: Policy, dtype: str) -> None:
    wire = WireWeights(policy.named_weights, dtype, policy.named_shapes)
    exported = export_weights(policy.named_weights(), 3, dtype)
    assert inspect(wire, 3) == (exported.fingerprint, exported.num_bytes)
    assert fingerprint(wire) == exported.fingerprint


def test_wire_weights_follow_the_policy(policy: Policy) -> None:
    wire = WireWeights(policy.named_weights, "float32", policy.named_shapes)
    before, _ = inspect(wire, 0)
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[7] += 1
    assert inspect(wire, 1)[0] != before


def test_weights_that_are_not_finite_are_not_published(policy: Policy) -> None:
    wire = WireWeights(policy.named_weights, "bfloat16", policy.named_shapes)
    with torch.no_grad():
        next(policy.model.parameters()).view(-1)[7] = math.nan
    with pytest.raises(TrainingDiverged, match="version 4 is not finite"):
        inspect(wire, 4)


def test_a_link_carries_what_the_run_file_says() -> None:
    cfg = WeightsConfig(packed_buffer_bytes=1 << 20)
    assert Link.of(cfg, "object_store", 1, 30.0) is None
    assert Link.of(cfg, "nccl", 2, 30.0) == Link("nccl", 2, 1 << 20, 30.0)
