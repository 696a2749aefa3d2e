"""What runs in other processes: rollout actors with their engines, scorers, the learner."""
