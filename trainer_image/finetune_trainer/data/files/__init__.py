"""Reads rows from data files: which kinds of files there are, how a file is opened and decompressed, and the functions
that yield the rows of each kind. What the columns of a row mean belongs in `data/`, and where the files come from
belongs in `sources/`.

All readers stream: what they hold in memory is bounded by the size of a few rows, and not by the size of the file.
"""
