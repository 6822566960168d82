"""Turns the rows of data files into the tensors of micro-batches: reads rows, renders them as token ids, orders and
packs the examples, and collates them. The code that lists and downloads data files belongs in `sources/`.

Only `batches.py` imports torch, and `micro_batches.py` imports `batches.py`. The preflight checks of data files use
neither of the two, because these checks run without torch.
"""
