"""`python -m finetune_trainer preflight`: looks at everything that a job needs before any GPU is asked for, and leaves
its findings in the termination message. One module a check; `program` runs them in a pod of its own, without torch.
"""
