"""The algorithm: what is learned, and how; never imports cluster, ray, vllm or wandb."""
