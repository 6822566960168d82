"""Conversations: reading the messages of a row, running the chat template, and finding the tokens that are learned.

Code for rows of other formats, and for what is done with the examples, belongs in `data/`. Nothing here imports
transformers or torch when it is imported, because the launcher and the preflight pod start without them.
"""
