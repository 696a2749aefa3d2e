"""What an evaluation says of one completion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluated completion.

    Attributes:
        prompt: Its text.
        completion: The sampled text.
        kl: Sum over the sampled tokens of the exact KL divergence to the reference, in nats; None without a reference.
        num_tokens: Sampled tokens.
        judged: The judge's verdict, or None without a judge.
        accuracy: How right the reward's verifier says it is, 0 to 1, or None where nothing verifies or the verifier failed.
        failed: Whether the verifier failed.
    """

    prompt: str
    completion: str
    kl: float | None
    num_tokens: int
    judged: bool | None
    accuracy: float | None = None
    failed: bool = False
