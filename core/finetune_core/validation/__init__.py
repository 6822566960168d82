"""Finds without a cluster what the API server and the operator would refuse in a job file.

`finetune validate` calls `validate_job.validate_job`. The operator calls only functions of the module `runnable`.
`cel_rules` imports the CEL library only when a rule is evaluated, because the image of the operator does not contain
the library.
"""
