"""What judges a group of trajectories, token by token."""
