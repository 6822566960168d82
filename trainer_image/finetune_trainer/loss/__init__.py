"""The loss of a causal language model: the summed negative log-likelihood of supervised tokens, with fused kernels.

`tests/trainer/test_fused.py` compares each kernel with plain torch. Micro-batches are made in `data/`.
"""
