"""The loss of a causal language model: the summed negative log-likelihood of supervised tokens, and dropout by a hash.

Micro-batches are made in `data/`. The kernels of the layers are in `kernels/`.
"""
