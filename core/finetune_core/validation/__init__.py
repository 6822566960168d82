"""Finds without a cluster what the API server and the operator would refuse in a job file.

`finetune validate` calls `validate_job.validate_job`. The operator calls only `runnable`. Its image does not contain
the CEL library, so `cel_rules` imports the library only when a rule is evaluated.
"""
