"""Computes the status of a job (conditions, progress, usage), writes it where it differs, and creates events about it.

All modules hold pure functions, except `writer.py` and `event_recorder.py`. `decide/`, not this room,
decides what happens next to a job.
"""
