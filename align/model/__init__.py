"""A causal language model behind a few verbs, on one process or many."""
