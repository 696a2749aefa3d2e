"""What a step logs, as far as the tests of the sinks look at it."""

from __future__ import annotations

STEP = {
    "reward/token_mean": -1.25,
    "kl/behavior_reference": 0.5,
    "policy/entropy": 2.345,
    "staleness/max": 1,
    "mismatch/abs_mean": 1.5e-6,
    "throughput/generated_tokens_per_s": 1234.0,
    "time/rollout_wait_s": 0.25,
    "time/update_s": 1.5,
    "time/publish_s": 0.75,
    "time/step_s": 2.5,
}
