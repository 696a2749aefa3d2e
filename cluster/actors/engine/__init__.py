"""The only place that imports vLLM: the engine, and both ends of a transfer of weights."""
