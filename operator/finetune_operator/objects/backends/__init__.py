"""Backends: the kinds of object that run the pods of an attempt, behind the interface `Backend` in `interface.py`.

PyTorchJob is the only backend so far. A new backend gets a module here; what every backend's pods have in common stays
in `objects/pod_template.py`.
"""
