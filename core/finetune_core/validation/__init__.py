"""Finds without a cluster what the API server and the operator would refuse in a job file.

`validate_job.validate_job` is the entry point. The operator's image does not contain the CEL library. Therefore the
operator imports only `runnable`, and the library is imported only when a rule is evaluated.
"""
