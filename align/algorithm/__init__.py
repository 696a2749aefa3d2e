"""Rewards to a loss: pure functions of tensors and numbers, and the bundles that name them."""
