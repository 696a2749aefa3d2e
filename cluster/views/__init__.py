"""What reads a run folder: status, inspect, report, plots."""
