"""The runtime: Ray actors, vLLM engines, the loop, weights, sinks and the `align` command."""
