"""Checkpoints of a run: save and upload them in the background, choose the one to resume from, export the artifact.

The layout of the bucket and the COMMIT protocol belong in `storage/`; the tensors of the training state in `engine/`.
"""
