"""`python -m finetune_trainer preflight`: checks object store, base model and data of a job in a small pod before the
operator requests GPUs, and leaves its findings in the termination message.

Each check is a module of this room, and `entrypoint.py` runs the checks. Nothing in this room imports torch.
"""
