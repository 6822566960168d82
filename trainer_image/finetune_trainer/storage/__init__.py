"""Reads and writes what the runs of a job keep in the S3-compatible object store: run records, checkpoints, step log,
scores and the artifact. Includes the client of the object store, which retries requests. `finetune_core.layout` defines
the keys.

Code that decides when to write belongs elsewhere, for checkpoints in `checkpoints/`. Nothing here imports torch.
"""
