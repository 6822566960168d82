"""Reads what exists for a job and returns it as values: stored FineTuneJob, child object, pods and warning events.

Each reconcile of a job starts here. This package writes nothing to the API server and decides nothing.
"""
