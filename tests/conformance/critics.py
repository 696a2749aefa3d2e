"""The peers' critics: GAE, value losses, adaptive KL coefficients, PPO as a whole, and what they are in our settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from align.algorithm import losses, returns
from align.algorithm.config import AlgorithmConfig
from align.algorithm.objective import Objective
from align.data.batching import Batch
from tests.conformance.peers import (
    EXACT,
    WITH_EPSILON,
    Case,
    Differs,
    Equal,
    NotOffered,
    Verdict,
    advantages_of,
    at,
    batch_of,
    loss_of,
    resolve,
    whole_mean,
)

BY_TOKEN = NotOffered("the value loss is a mean over tokens, whatever the policy's is")
SCALED_REWARDS = NotOffered("rewards scaled without centring")


def gae_parts(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our parts for their lambda and discount."""
    gae_lambda = params["lam"] if "lam" in params else params["lambd"]
    return {"baseline": "critic", "gae_lambda": gae_lambda, "discount": params["gamma"]}


def with_values(batch: Batch, case: Case) -> Batch:
    """The batch with the case's old values."""
    return dataclasses.replace(batch, old_values=case.input("values"))


def targets_of(batch: Batch, **parts: Any) -> Tensor:
    """What our critic would learn from the batch under these parts."""
    return Objective(AlgorithmConfig(**parts)).value_targets(batch)


def gae_over_holes(rewards: Tensor, values: Tensor, mask: Tensor, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """GAE in which a token outside the mask is a step with reward and value 0."""
    parts = gae_parts(params)
    inside = (tensor.masked_fill(~mask, 0.0) for tensor in (rewards, values))
    return returns.gae(*inside, torch.ones_like(mask), parts["discount"], parts["gae_lambda"])


def whitened_gae(case: Case) -> Verdict:
    """verl: whitened advantages; a step outside the mask takes no time."""
    mask = case.mask("response_mask")
    batch = with_values(batch_of(mask, case.input("token_level_rewards")), case)
    parts = gae_parts(case.params)
    pairs = {
        "advantages": (at(mask, advantages_of(batch, whiten=True, **parts)), at(mask, case.output("advantages"))),
        "returns": (at(mask, targets_of(batch, **parts)), at(mask, case.output("returns"))),
    }
    return Equal(pairs, WITH_EPSILON)


def plain_gae(case: Case) -> Verdict:
    """OpenRLHF: not whitened; discounted through the tokens outside the mask."""
    mask, rewards = case.mask("action_mask"), case.input("rewards")
    batch, parts = with_values(batch_of(mask, rewards), case), gae_parts(case.params)
    ours = {"advantages": advantages_of(batch, **parts), "returns": targets_of(batch, **parts)}
    pairs = {name: (at(mask, value), at(mask, case.output(name))) for name, value in ours.items()}
    if "holes" not in case.id or parts["discount"] * parts["gae_lambda"] == 1:
        return Equal(pairs, EXACT)
    advantages, targets = gae_over_holes(rewards, case.input("values"), mask, case.params)
    explained = {"advantages": at(mask, advantages), "returns": at(mask, targets)}
    return Differs(
        "discounted through the tokens outside the mask, which take no time in ours", pairs, EXACT, explained
    )


def value_loss(values: str, old: str, targets: str, mask: str, clip: str) -> Any:
    """The handler of a value loss whose inputs have these names, with a mean over tokens."""

    def handler(case: Case) -> Verdict:
        if case.params.get("loss_agg_mode", "token-mean") != "token-mean" or not case.params.get(
            "token_level_loss", True
        ):
            return BY_TOKEN
        leaf, inside = case.input(values).requires_grad_(), case.mask(mask)
        limit = math.inf if case.params[clip] is None else case.params[clip]
        token_losses, clipped = losses.value_loss(leaf, case.input(old), case.input(targets), inside, limit)
        loss = whole_mean(token_losses, inside, "token_mean")
        (gradient,) = torch.autograd.grad(loss, leaf)
        pairs = {
            "loss": (loss.detach(), case.output("loss")),
            "gradient": (gradient, case.output(f"grad_{values}")),
        }
        if "vf_clipfrac" in case.outputs:
            pairs["clipped"] = (clipped[inside].double().mean(), case.output("vf_clipfrac"))
        return Equal(pairs, WITH_EPSILON)

    return handler


def kl_controller(case: Case) -> Verdict:
    params = case.params
    kl, target = (
        params[long if long in params else short]
        for long, short in (("current_kl", "current"), ("target_kl", "target"))
    )
    ours = losses.adapted_kl_coefficient(params["init_kl_coef"], kl, target, params["n_steps"], params["horizon"])
    return Equal({"coefficient": (torch.tensor(ours, dtype=torch.float64), case.output("value"))}, EXACT)


def trl_ppo(case: Case) -> Verdict:
    """TRL's PPO from log-probs to losses: the score is paid one step after the last token, in a state of its own."""
    params = case.params
    if params["whiten_rewards"]:
        return SCALED_REWARDS
    mask, scores = resolve("shared.mask") > 0, case.input("scores")
    behavior, ref, old_values = (case.input(name) for name in ("logprobs", "ref_logprobs", "values"))
    longer = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)  # one more step, where the row has room
    kl = (
        {"kl": "reward", "kl_estimator": params["kl_estimator"], "kl_coefficient": params["kl_coef"]}
        if params["kl_coef"]
        else {}
    )
    estimate = losses.kl_estimate(behavior, ref, params["kl_estimator"]).masked_fill(~mask, 0.0)
    theirs_paid = returns.on_last_action(scores, longer) - params["kl_coef"] * estimate
    later = returns.gae(theirs_paid, old_values, longer, params["gamma"], params["lam"])
    batch = with_values(batch_of(mask, returns.on_last_action(scores, mask), behavior, ref), case)
    parts = gae_parts(params)
    ours = ppo(case, batch, {**parts, **kl})
    advantages = returns.whiten(later[0].masked_fill(~mask, 0.0), mask)
    explained = ppo_losses(case, mask, longer, advantages, later[1])
    theirs = {
        "advantages": at(mask, case.output("advantages")),
        "returns": at(mask, case.output("returns")),
        "policy loss": case.output("pg_loss"),
        "value loss": case.output("vf_loss"),
        "policy gradient": case.output("grad_new_logprobs"),
    }
    full = mask.all(dim=1)
    return Differs(
        "the score is paid one step after the last token, where the row has room, in a state with a value of its own",
        {name: (ours[name], value) for name, value in theirs.items()},
        WITH_EPSILON,
        {name: explained[name] for name in theirs},
        equal={"returns of rows without room": (ours["all returns"][full], case.output("returns")[full])},
    )


def ppo(case: Case, batch: Batch, parts: dict[str, Any]) -> dict[str, Tensor]:
    """Our advantages, targets and losses."""
    mask, targets = batch.loss_mask, targets_of(batch, **parts)
    return ppo_losses(case, mask, mask, advantages_of(batch, whiten=True, **parts), targets)


def ppo_losses(case: Case, mask: Tensor, valued: Tensor, advantages: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Both losses under the case's clips; the value loss over the states of `valued`."""
    clip = case.params["cliprange"]
    policy = loss_of(
        mask,
        case.input("new_logprobs"),
        case.input("logprobs"),
        advantages,
        surrogate="ppo_clip",
        aggregation="token_mean",
        clip_low=clip,
        clip_high=clip,
    )
    value, _ = losses.value_loss(
        case.input("vpred"), case.input("values"), targets, valued, case.params["cliprange_value"]
    )
    return {
        "advantages": at(mask, advantages),
        "returns": at(mask, targets),
        "all returns": targets,
        "policy loss": policy["loss"],
        "policy gradient": policy["gradient"],
        "value loss": whole_mean(value, valued, "token_mean"),
    }
