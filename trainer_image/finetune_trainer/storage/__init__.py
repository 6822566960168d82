"""What a run keeps in the S3-compatible object store below its root: run records, checkpoints, step log, scores and the
artifact, on top of a client that retries requests.

The layout's keys come from `finetune_core.layout`. When to write belongs into other rooms: `checkpoints/` decides that
for checkpoints. Nothing here imports torch.
"""
