"""`align doctor`: what is looked at before a run takes its machines, a file for each thing that is looked at.

`machine` and `network` look at one machine, `nodes` at every machine of a cluster, `tokens`, `answers` and `storage` at what a
run file names, and `agreement` at the engine and the learner at work. `examination` puts them together. Every look ends in
verdicts: what was looked at, how it is, what was found, and the fix.
"""
