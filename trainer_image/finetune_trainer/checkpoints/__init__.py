"""Checkpoints of a run: these modules save and upload checkpoints in the background, choose the checkpoint to resume
from, and export the artifact (an adapter or a model) with its model card. They also merge the adapter that a job starts
from into the base model, if `model.adapter.use` is Merge.

Code for the layout of the bucket and for the COMMIT protocol belongs in `storage/`. Code that collects the tensors of
the training state belongs in `engine/`.
"""
