"""What a run writes: its folder, checkpoints, trajectories, figures."""
