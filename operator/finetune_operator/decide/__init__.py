"""Decides what a job's state is and what happens next: attempts, verdicts, deadlines and the preflight check.

The functions are pure: they take the stored status and what was observed, and return a `Decision`. Nothing here reads a
clock or sends a request; import-linter forbids imports of the API client.
"""
