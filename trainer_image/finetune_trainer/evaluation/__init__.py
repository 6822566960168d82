"""How good a model is on the rows of an evaluation set: perplexity, generated answers, grades, and the file with both.

`train.py`, `loop.py` and `finish.py` call this package. It belongs here what measures a model; `decisions/` compares
the figures and chooses the best checkpoint, `reporting/` shows them.
"""
