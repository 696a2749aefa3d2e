"""The bill of a run, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.capacity.arithmetic import Arithmetic
from cluster.capacity.bill import SHARED_GPU, Role, places, roles
from tests.fakes.run_files import config
from tests.fakes.shapes import SHAPE

CPU = {"rollout": {"dtype": "float32"}}


def bill(**sections: dict[str, object]) -> dict[str, Role]:
    """The roles by name, without what a process takes before any model."""
    from cluster.capacity.bill import _PROCESS_BYTES

    found = roles(config(**sections), SHAPE, SHAPE)
    return {
        r.name: Role(r.name, r.count, r.cpus, r.gpus, r.host_bytes - _PROCESS_BYTES[r.name], r.gpu_bytes, r.formula)
        for r in found
    }


def test_keys_and_values_of_a_token_take_two_tensors_of_every_layer() -> None:
    assert SHAPE.kv_bytes_per_token(2) == 2 * 2 * 2 * 4 * 2


def test_a_learner_on_a_cpu_holds_weights_gradient_moments_activations_and_logits_in_float32() -> None:
    learner = bill(**CPU, learner={"max_tokens_per_micro_batch": 10})["learner"]
    assert learner.host_bytes == 16 * 1000 + 68 * 10 * 8 * 2 + 8 * 10 * 50
    assert (learner.gpu_bytes, learner.gpus) == (0, 0)


def test_a_learner_on_a_gpu_also_holds_the_weights_cast_to_bfloat16() -> None:
    learner = bill(learner={"max_tokens_per_micro_batch": 10, "num_gpus": 1}, rollout={"num_gpus": 1})["learner"]
    assert learner.gpu_bytes == 16 * 1000 + 34 * 10 * 8 * 2 + 2 * 1000 + 8 * 10 * 50
    assert learner.host_bytes == 4 * 1000


def test_ranks_hold_a_share_of_the_states_each_and_at_times_all_moments_in_host_memory() -> None:
    learner = bill(learner={"max_tokens_per_micro_batch": 10, "num_gpus": 1, "num_ranks": 2}, rollout={"num_gpus": 1})[
        "learner"
    ]
    assert (learner.count, learner.gpus) == (2, 1)
    ends, layer = 2 * 50 * 8, (1000 - 2 * 50 * 8) // 2  # embeddings and head; one of the two layers
    assert learner.gpu_bytes == 8 * 1000 + 8 * (ends + layer) + 2 * layer + 34 * 10 * 8 * 2 + 8 * 10 * 50
    assert learner.host_bytes == 8 * 1000


def test_with_an_adapter_the_weights_are_there_once_and_gradient_and_moments_are_those_of_the_adapter() -> None:
    shape, cfg = replace(SHAPE, num_adapter_parameters=30), config(**CPU, learner={"max_tokens_per_micro_batch": 10})
    plain, adapted = (roles(cfg, one, SHAPE)[1].host_bytes for one in (SHAPE, shape))
    assert plain - adapted == 12 * 1000 - 16 * 30
    assert Arithmetic.of(cfg, shape).checkpoint_bytes == 4 * 1000 + 12 * 30
    assert Arithmetic.of(cfg, shape).publish_bytes == Arithmetic.of(cfg, SHAPE).publish_bytes == 4 * 1000
    ranks = config(**CPU, learner={"max_tokens_per_micro_batch": 10, "num_ranks": 2, "num_gpus": 1})
    plain, adapted = (roles(ranks, one, SHAPE)[1].gpu_bytes for one in (SHAPE, shape))
    assert plain - adapted == (12 * 1000 - 16 * 30) // 2
    as_adapter = config(**CPU, policy={"model": Path("m"), "adapter": {"publish": "adapter"}})
    assert Arithmetic.of(as_adapter, shape).publish_bytes == 4 * 30


def test_moments_in_8_bits_take_two_bytes_and_the_scales_and_those_of_one_matrix_are_there_in_float32() -> None:
    plain = bill(**CPU)["learner"].host_bytes
    found = bill(**CPU, optimizer={"moments": "8bit"})["learner"].host_bytes
    assert found - plain == 2125 - 8000 + 8 * 50 * 8
    cfg = config(**CPU, optimizer={"moments": "8bit"})
    assert Arithmetic.of(cfg, SHAPE).checkpoint_bytes == 4 * 1000 + 2125


def test_offloaded_moments_are_in_host_memory() -> None:
    sections = {"learner": {"num_gpus": 1, "num_ranks": 2}, "rollout": {"num_gpus": 1}}
    plain, offloaded = bill(**sections)["learner"], bill(**sections, optimizer={"offload": True})["learner"]
    assert plain.gpu_bytes - offloaded.gpu_bytes == 8 * 1000 // 2 - 8 * 50 * 8 // 2
    assert offloaded.host_bytes - plain.host_bytes == 8 * 1000 // 2


def test_a_critic_is_whole_on_every_rank_with_its_own_moments_and_is_saved() -> None:
    critic = replace(SHAPE, num_parameters=300)
    plain = config(**CPU, learner={"num_ranks": 2})
    cfg = config(**CPU, learner={"num_ranks": 2}, algorithm={"name": "ppo"}, critic={"optimizer": {"moments": "8bit"}})
    more = roles(cfg, SHAPE, SHAPE, critic)[1].host_bytes - roles(plain, SHAPE, SHAPE)[1].host_bytes
    kept = 17 * 300 // 8
    assert more == 8 * 300 + kept + 8 * 50 * 8
    assert Arithmetic.of(cfg, SHAPE, critic).checkpoint_bytes == 12 * 1000 + 4 * 300 + kept


def test_with_checkpointing_a_layer_keeps_its_input_alone_and_one_layer_is_computed_again() -> None:
    learner = {"max_tokens_per_micro_batch": 10, "num_gpus": 1, "activation_checkpointing": True}
    found = bill(learner=learner, rollout={"num_gpus": 1})["learner"]
    assert found.gpu_bytes == 16 * 1000 + (34 + 2 * 2) * 10 * 8 + 2 * 1000 + 8 * 10 * 50


def test_no_more_logits_than_the_learner_may_hold_are_counted() -> None:
    learner = {"max_tokens_per_micro_batch": 10, "num_gpus": 1, "max_logits_bytes": 400}
    found = bill(learner=learner, rollout={"num_gpus": 1})["learner"]
    assert found.gpu_bytes == 16 * 1000 + 34 * 10 * 8 * 2 + 2 * 1000 + 2 * 400


def test_learner_and_engine_on_one_gpu_share_it_and_their_memory_adds_up() -> None:
    sections = {"learner": {"num_gpus": 1}, "rollout": {"num_gpus": 1}}
    apart, together = bill(**sections), bill(**sections, weights={"transport": "ipc"})
    both = apart["learner"].gpu_bytes + apart["rollout"].gpu_bytes
    assert [(together[name].gpus, together[name].gpu_bytes) for name in ("learner", "rollout")] == [
        (SHARED_GPU, both)
    ] * 2


def test_ray_is_asked_for_cpus_and_gpus_of_every_process_and_for_one_place_where_two_share_a_gpu() -> None:
    sections = {"learner": {"num_gpus": 1, "num_cpus": 2}, "rollout": {"num_gpus": 1, "num_cpus": 3}}
    apart = places(config(**sections, scorer={"num_actors": 2, "num_gpus": 0.5}))
    assert [(p.name, p.count, p.cpus, p.gpus) for p in apart] == [
        ("learner", 1, 2, 1),
        ("rollout", 1, 3, 1),
        ("scorer", 2, 0, 0.5),
    ]
    together = places(config(**sections, weights={"transport": "ipc"}))
    assert [(p.name, p.count, p.cpus, p.gpus) for p in together] == [("learner", 1, 5, 0.5), ("scorer", 1, 0, 0)]
    assert {p.host_bytes + p.gpu_bytes for p in (*apart, *together)} == {0}


def test_an_engine_over_several_gpus_holds_its_share_on_each() -> None:
    engine = bill(rollout={"num_gpus": 4, "max_model_len": 100}, sampling={"max_tokens": 10})["rollout"]
    assert engine.gpu_bytes == 2 * 1000 // 4 + 64 * 100 // 4
    assert engine.gpus == 4


def test_a_reference_that_computes_in_bfloat16_on_a_cpu_is_there_twice() -> None:
    sections = {"scorer": {"max_tokens_per_micro_batch": 10}}
    moving = bill(**CPU, **sections, reference={"refresh_every": 5})["scorer"].host_bytes
    assert moving - bill(**CPU, **sections)["scorer"].host_bytes == 8 * 1000
    halves = bill(rollout={"dtype": "bfloat16"}, **sections)["scorer"].host_bytes
    assert halves - bill(**CPU, **sections)["scorer"].host_bytes == 2 * 1000
