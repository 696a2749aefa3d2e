"""The algorithm: types, prompts, policy, rewards, returns, losses, learner. Never imports cluster, ray, vllm or wandb."""
