"""The update: one batch in, optimizer steps, statistics out."""
