"""Makes the examples of many rows in little time: many texts in one call of the tokenizer, chunks of rows in several
processes, and a folder that keeps the examples for the next start. The result is always the one of
`dataset.make_examples`.

`prepared_rows.py` has the function that replaces `make_examples`, and `example_folder.py` the one that keeps its
result. What a row becomes is decided in `data/`, and not here.
"""
