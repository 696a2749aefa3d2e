"""The runtime: Ray actors, vLLM engines, the loop, the record of a run and the `align` command."""
