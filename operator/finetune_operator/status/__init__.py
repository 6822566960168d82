"""Computes the status of a job (conditions, progress, usage), writes it where it differs from the stored status, and
creates events about the change.

All modules hold pure functions, except `writer.py` and `event_recorder.py`. What happens next to a job is decided in
`decide/`, and not here.
"""
