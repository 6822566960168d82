"""Computes the status of a job (conditions, progress, usage), writes it where it differs, and creates events about it.

Everything but `writer.py` and `event_recorder.py` is a pure function. What happens next to a job is decided in
`decide/`.
"""
