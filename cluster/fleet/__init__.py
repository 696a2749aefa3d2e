"""The driver's side of Ray: where processes run, calls with deadlines, publication."""
