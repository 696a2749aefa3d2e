"""Metrics: a value with its name and the way it is reduced, and the glossary that explains every name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reduce = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True, slots=True)
class Definition:
    """What a metric means.

    Attributes:
        unit: The unit, "" for a pure number.
        meaning: One sentence; what to make of high and low values where that helps.
        reduce: How several values of one step become one.
    """

    unit: str
    meaning: str
    reduce: Reduce


def _d(meaning: str, unit: str = "", reduce: Reduce = "mean") -> Definition:
    return Definition(unit, meaning, reduce)


GLOSSARY: dict[str, Definition] = {
    "reward/token_mean": _d("Mean reward of a sampled token. With alpha = 1 its best value is 0.", "nats"),
    "reward/trajectory_mean": _d("Mean over trajectories of the sum of a trajectory's token rewards.", "nats"),
    "reward/quarantined_fraction": _d("Share of judged trajectories whose verifier failed; they are not trained."),
    "reward/clipped_fraction": _d("Share of rewards (of tokens, or outcomes) that algorithm.reward_range moved."),
    "kl/behavior_reference": _d("Mean of log mu - log P_ref over sampled tokens: the k1 estimate per token.", "nats"),
    "kl/policy_reference": _d("Mean of the KL estimate to the reference that the loss charges, per token.", "nats"),
    "kl/policy_behavior": _d("k3 estimate of KL(mu || pi) before the update; about 0 when on-policy.", "nats"),
    "kl/trajectory_behavior_reference": _d(
        "Mean of log mu - log P_ref summed over a trajectory; kl_target aims at it.", "nats"
    ),
    "kl/coefficient": _d("The KL coefficient that the update charged, where kl_target adapts it.", "", "last"),
    "policy/entropy": _d("Mean entropy of the policy where tokens were sampled; a fall to 0 is collapse.", "nats"),
    "return/mean": _d("Mean return (reward-to-go) of a sampled token.", "nats"),
    "advantage/std": _d("Standard deviation of the advantages that multiply the gradient.", "nats"),
    "advantage/clipped_fraction": _d("Share of tokens whose advantage algorithm.max_advantage cut."),
    "surrogate/clipped_fraction": _d(
        "Share of tokens whose ratio hit a clip or bound; all but cispo give them no gradient."
    ),
    "importance/weight_mean": _d(
        "Mean importance weight pi/mu (decoupled: proximal/mu); near 1 when on-policy or mildly stale."
    ),
    "importance/truncated_fraction": _d("Share of tokens whose importance weight hit a bound, or that it rejected."),
    "importance/chi_square": _d(
        "Mean of (pi/mu)^2 - 1 over tokens, unbounded by weights; 0 on-policy, large is noise."
    ),
    "importance/effective_sample_fraction": _d(
        "Share of tokens that unweighted ones would need to say as much; 1 on-policy."
    ),
    "guard/covariance": _d(
        "Mean of algorithm.entropy_guard's covariance of log-probability and advantage; entropy falls with it.", "nats"
    ),
    "guard/token_fraction": _d("Share of tokens that algorithm.entropy_guard holds."),
    "supervised/token_fraction": _d("Share of tokens that algorithm.supervised_coefficient imitates."),
    "distillation/divergence": _d(
        "Mean divergence from the reference that algorithm.distillation charges, per token.", "nats"
    ),
    "distillation/rest_fraction": _d(
        "Mean probability that the reference gives to tokens beyond algorithm.distillation_top_k."
    ),
    "support/outside_fraction": _d(
        "Share of sampled tokens outside what the learner's own top-k and top-p keep; rounding, at one version."
    ),
    "mismatch/abs_mean": _d("Mean |log mu - log pi| over tokens sampled at the learner's own version.", "nats"),
    "mismatch/abs_max": _d(
        "Largest |log mu - log pi| over tokens sampled at the learner's own version.", "nats", "max"
    ),
    "optimizer/loss": _d("The surrogate loss. Its value means little (on-policy with a baseline it is near 0)."),
    "optimizer/grad_norm": _d("Norm of the gradient before clipping."),
    "optimizer/lr": _d("Learning rate of the step.", "", "last"),
    "optimizer/skipped_updates": _d(
        "Updates so far with an optimizer step left out because loss or gradient was not finite.", "count", "last"
    ),
    "optimizer/inner_steps": _d(
        "Optimizer steps that the batch was good for; fewer than num_epochs * num_minibatches if some were skipped.",
        "count",
        "sum",
    ),
    "critic/loss": _d("Mean of half the squared error of the critic, clipped, per token."),
    "critic/clipped_fraction": _d("Share of tokens that algorithm.value_clip left without gradient."),
    "critic/explained_variance": _d(
        "Share of the targets' variance that the critic foresaw before it learned from them; 1 is perfect, 0 or less useless."
    ),
    "critic/value_mean": _d("Mean value of the states that tokens were sampled in.", "nats"),
    "critic/grad_norm": _d("Norm of the critic's gradient before clipping."),
    "trajectory/completion_tokens_mean": _d("Mean length of a completion.", "tokens"),
    "trajectory/stopped_fraction": _d("Share of completions that ended by themselves, not by length."),
    "trajectory/overlong_masked_fraction": _d(
        "Share of trajectories cut off by length that algorithm.mask_overlong masked."
    ),
    "staleness/mean": _d("Mean over groups of learner version minus the group's oldest version.", "versions"),
    "staleness/max": _d("The same, largest; never above run.max_staleness.", "versions", "max"),
    "tokens/generated": _d("Tokens sampled for the step.", "tokens", "sum"),
    "tokens/masked": _d("Sampled tokens that algorithm.mask_overlong took out of the update.", "tokens", "sum"),
    "tokens/trained": _d("Sampled tokens that the update learned from.", "tokens", "sum"),
    "throughput/generated_tokens_per_s": _d("Sampled tokens of the step over time/step_s.", "tokens/s"),
    "throughput/trained_tokens_per_s": _d("Trained tokens (with prompts) over the time of the update.", "tokens/s"),
    "throughput/padding_fraction": _d("Padding among the tokens the learner computed; 0 when packed."),
    "time/rollout_wait_s": _d("Time the learner waited for groups.", "s", "sum"),
    "time/update_s": _d("Time of the update: gradients and optimizer step.", "s", "sum"),
    "time/publish_s": _d(
        "Time to publish the weights to every rollout actor, verification and a refresh of the reference included.",
        "s",
        "sum",
    ),
    "time/other_s": _d(
        "Rest of time/step_s: evaluation, checkpoint and logging of the step before; the other phases are rollout_wait, update "
        "and publish.",
        "s",
        "sum",
    ),
    "time/eval_s": _d("Time of the evaluation.", "s", "sum"),
    "time/checkpoint_s": _d("Time to write the checkpoint.", "s", "sum"),
    "time/step_s": _d(
        "Wall time from the last publish to this one, evaluation and checkpoint in between included.", "s", "sum"
    ),
    "idle/learner_fraction": _d("Share of time/step_s in which the learner waited for groups."),
    "idle/rollout_fraction": _d(
        "Share of the rollout actors' time without a request in flight, or with requests held up by a load of weights."
    ),
    "idle/scorer_fraction": _d("Share of the scorers' time in which they scored no group."),
    "weights/version": _d("Policy version that every rollout actor serves after the step.", "version", "last"),
    "weights/published_bytes": _d("Bytes sent to each rollout actor.", "bytes", "last"),
    "weights/canary_gap": _d(
        "Mean |engine - learner| log-probability on fixed sequences at the same version; the worst actor.",
        "nats",
        "max",
    ),
    "ledger/admitted": _d(
        "Prompts admitted so far; equals trained + filtered + quarantined + returned + in flight.", "prompts", "last"
    ),
    "ledger/trained": _d(
        "Prompts that were part of an update so far, skipped updates included.",
        "prompts",
        "last",
    ),
    "ledger/filtered": _d("Prompts whose group was dropped so far, since it had no signal.", "prompts", "last"),
    "ledger/quarantined": _d("Prompts whose group was dropped so far, since its reward failed.", "prompts", "last"),
    "ledger/returned": _d("Prompts given back so far because their rollout actor was lost.", "prompts", "last"),
    "goodput/trained_fraction": _d(
        "Trained tokens among those whose fate was decided in the step; low is wasted work."
    ),
    "goodput/sampled_tokens": _d(
        "Tokens of groups handed over so far, over resumes; equals the sum of the fates below. Without evaluations.",
        "tokens",
        "last",
    ),
    "filter/dropped_passed": _d("Groups dropped for the step because all trajectories passed.", "groups", "sum"),
    "filter/dropped_failed": _d("Groups dropped for the step because all failed alike.", "groups", "sum"),
    "filter/pass_rate": _d("Mean share of trajectories that passed, over the step's trained and dropped groups."),
    "filter/skipped": _d("Turns of too easy or too hard prompts skipped so far by the curriculum.", "prompts", "last"),
    "reference/version": _d(
        "Policy version whose weights the reference has; 0 is the reference's own.", "version", "last"
    ),
    "fleet/restarts": _d("Rollout actors replaced so far.", "count", "last"),
    "memory/rss_bytes": _d("Resident memory of all processes of the run on this machine.", "bytes", "max"),
}

for _set in ("heldout", "train"):
    _which = {"heldout": "prompts never trained on", "train": "prompts of the training set"}[_set]
    GLOSSARY[f"eval/{_set}/kl_per_token"] = _d(f"Exact full-vocabulary KL(pi || ref) per token, {_which}.", "nats")
    GLOSSARY[f"eval/{_set}/accuracy"] = _d(
        f"Mean verdict, 0 to 1, of the reward's verifier on sampled answers, {_which}."
    )
    GLOSSARY[f"eval/{_set}/unjudged_fraction"] = _d(
        f"Share of sampled answers that the reward's verifier failed on, which the accuracy leaves out, {_which}."
    )
    GLOSSARY[f"eval/{_set}/grammatical"] = _d(f"Share of sampled sentences that the parser accepts, {_which}.")
    GLOSSARY[f"eval/{_set}/completion_tokens_mean"] = _d(f"Mean length of a sampled completion, {_which}.", "tokens")


for _fate, _meaning in {
    "trained": "that carried loss in an applied update",
    "filtered": "of groups without signal",
    "masked": "cut off by length and masked",
    "skipped": "of updates that were not finite",
    "quarantined": "whose reward failed, or that of most of their group",
    "returned": "whose rollout actor was lost before they were scored",
    "redone": "trained after the checkpoint that a resumed run went on from",
    "left": "that were waiting when a process of the run ended",
    "waiting": "to be scored, or in the buffer",
}.items():
    GLOSSARY[f"goodput/{_fate}_tokens"] = _d(f"Sampled tokens so far {_meaning}.", "tokens", "last")


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured value.

    Attributes:
        name: `section/name_unit`, in the glossary.
        value: The value.
        weight: Weight in a mean (a number of tokens, say); ignored by the other reductions.
    """

    name: str
    value: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in GLOSSARY:
            raise ValueError(f"metric {self.name!r} is not in align.metrics.GLOSSARY; explain it there")


def reduce(metrics: Iterable[Metric]) -> dict[str, float]:
    """One value per name, by the reduction of the glossary; a mean is weighted over all parts, never a mean of means."""
    parts: dict[str, list[Metric]] = {}
    for metric in metrics:
        parts.setdefault(metric.name, []).append(metric)
    return {name: _reduce_one(GLOSSARY[name].reduce, same) for name, same in parts.items()}


def _reduce_one(how: Reduce, metrics: list[Metric]) -> float:
    match how:
        case "sum":
            return sum(m.value for m in metrics)
        case "max":
            return max(m.value for m in metrics)
        case "last":
            return metrics[-1].value
        case "mean":
            weight = sum(m.weight for m in metrics)
            return sum(m.value * m.weight for m in metrics) / weight if weight else 0.0
