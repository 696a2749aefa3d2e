"""The small world of the demo: its language, its parser, its models."""
