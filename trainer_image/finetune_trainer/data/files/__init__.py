"""Reads rows from data files of each kind: which kinds there are, how a file is opened and decompressed, and one module
for each kind that yields its rows. What the columns of a row mean belongs in `data/`, and where the files come from
belongs in `sources/`.

All readers stream: what they hold in memory is bounded by the largest row, and not by the file.
"""
