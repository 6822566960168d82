"""Backends: the kinds of object that run the pods of an attempt, behind the interface `Backend` in `interface.py`.

PyTorchJob is the only backend so far. A new backend gets a module here. `objects/pod_template.py` holds what the pods
of all backends have in common.
"""
