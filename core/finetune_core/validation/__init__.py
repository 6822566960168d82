"""Says of a job file what the API server and the operator will say of it, without either.

`job.validate_job` is the way in. The operator itself imports `runnable` only; the CEL library is imported where a rule
is evaluated.
"""
