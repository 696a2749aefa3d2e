"""`align doctor`: what is looked at before a run takes its machines, a file for each thing."""
