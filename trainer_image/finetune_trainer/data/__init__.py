"""From the rows of data files to the tensors of micro-batches: reading rows, rendering them as token ids, the order of
the rows, packing, and collation. Where the files come from belongs into `sources/`.

Only `batches.py` and `micro_batches.py` import torch, so that the preflight checks can use everything else without torch.
"""
