"""Conversations: reading the messages of a row, running the chat template, and finding the tokens that are learned.

Code for rows of other formats, and code that works on finished examples, belongs in `data/`. No module of this package
imports transformers or torch when it is imported itself, because the launcher and the preflight pod start without them.
"""
