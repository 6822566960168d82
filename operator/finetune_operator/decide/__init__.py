"""Decides what a job's state is and what happens next: attempts, verdicts, deadlines and the preflight check.

Pure functions from the stored status and an observation to a `Decision`. Nothing here reads a clock, sends a request or
imports a client; import-linter holds that.
"""
