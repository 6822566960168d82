"""Checkpoints of a run: these modules save and upload checkpoints in the background, choose the checkpoint to resume
from, and export the artifact (an adapter or a model).

The layout of the bucket and the COMMIT protocol belong in `storage/`; the tensors of the training state in `engine/`.
"""
