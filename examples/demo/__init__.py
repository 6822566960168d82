"""The demo (`make demo`): a real cluster on this machine, in which a FineTuneJob runs from its start to its artifact.

`steps.py` has the functions that set up a cluster for a FineTuneJob. The end-to-end tests call these functions too.
"""
