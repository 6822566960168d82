"""The demo (`make demo`): a real cluster on this machine, in which a FineTuneJob runs from its start to its artifact.

Helpers that set up a cluster for a FineTuneJob are in `steps.py`, and the end-to-end tests use them too.
"""
