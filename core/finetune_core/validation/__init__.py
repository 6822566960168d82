"""Finds without a cluster what the API server and the operator would refuse in a job file.

`finetune validate` calls `validate_job.validate_job`. The operator calls only functions of the module `runnable`. They
need no CEL library, which the image of the operator does not contain. `cel_rules` imports the library only when a rule
is evaluated, so that the other commands of `finetune` do not load it.
"""
