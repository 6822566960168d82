"""Measures how good a model is on an evaluation set: perplexity, generated answers and their grades.

`train.py`, `loop.py`, `finish.py` and the preflight check call this package. Code that chooses a checkpoint by the
measured figures belongs in `decisions/`. Code that shows the figures to people belongs in `reporting/`.
"""
