"""Rows from files, examples from rows, batches from examples. Free of torch but for `batches.py`."""
