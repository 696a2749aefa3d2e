"""When numbers count as equal, so that they say nothing: told in one place to the estimators and to what filters groups."""

ROUNDING = 1e-6
"""Numbers whose spread is at most this share of the largest magnitude differ by rounding alone."""
