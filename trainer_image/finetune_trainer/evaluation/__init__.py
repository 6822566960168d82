"""Measures how good a model is on an evaluation set: perplexity, generated answers and their grades.

`train.py`, `loop.py` and `finish.py` call this room. Code that chooses a checkpoint by the measured figures belongs
into `decisions/`. Code that shows the figures to people belongs into `reporting/`.
"""
