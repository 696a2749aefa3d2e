"""Prompts to batches: the types that all share, files and generators, a seeded order, packing."""
