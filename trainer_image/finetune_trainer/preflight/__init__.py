"""`python -m finetune_trainer preflight` checks the object store, the base model and the data of a job in a small pod,
before the operator requests GPUs. The findings go into the pod's termination message.

Each check is a module of this room, and `entrypoint.py` runs the checks. Nothing in this room imports torch.
"""
