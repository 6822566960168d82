"""Turns the rows of data files into the tensors of micro-batches: reads rows, renders them as token ids, orders and
packs the examples, and collates them. The code that lists and downloads data files belongs in `sources/`.

Only `batches.py`, `micro_batches.py` and `ahead.py` need torch. The preflight checks of data files use none of the
three, because these checks run without torch.
"""
