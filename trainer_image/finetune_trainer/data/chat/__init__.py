"""Conversations: reading the messages of a row, running the chat template, and finding the tokens that are learned.

What becomes of other rows, and of the examples, belongs to `data/`. Nothing here imports transformers or torch when it
is imported, because the launcher and the preflight pod start without them.
"""
