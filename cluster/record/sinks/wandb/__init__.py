"""The record of a run for W&B: the only place that imports wandb."""
