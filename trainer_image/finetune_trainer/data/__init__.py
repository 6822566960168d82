"""From the rows of data files to the tensors of micro-batches: reading rows, rendering the rows as token ids, the order
of rows, packing, and collation. Where the files come from belongs into `sources/`.

Only `batches.py` and `micro_batches.py` import torch, so that the preflight checks can use the other modules without
torch.
"""
