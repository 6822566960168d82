"""Reads what exists for a job and returns it as values: stored FineTuneJob, child object, pods and warning events.

Each reconcile starts here. Nothing in this room writes to the API server, and nothing decides what happens next.
"""
