"""`python -m finetune_trainer preflight` checks the object store, the base model and the data of a job in a small pod,
before the operator requests GPUs. The findings go into the pod's termination message.

`store_check.py`, `model_check.py`, `row_check.py` and `task_check.py` check the job. `former_run.py` searches for a run
that the job can take over. `entrypoint.py` runs all of them. torch is imported only in a child process, for the
trainer's own checks of the base model.
"""
