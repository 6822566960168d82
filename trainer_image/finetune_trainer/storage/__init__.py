"""Reads and writes what the runs of a job keep in the S3-compatible object store: run records, checkpoints, step log,
scores, digests of model files, extended base models and the artifact. The package also has the client of the object
store, which repeats failed requests. `finetune_core.layout` defines the keys.

Code that decides when to write belongs elsewhere: for checkpoints, it belongs in `checkpoints/`. No module of the
package imports torch.
"""
