"""Computes numbers about a training: batch sizes, the ZeRO stage, the number of steps, FLOPs, and the scratch space of
a pod.

All functions are pure and need neither torch nor a cluster, so that every part of the project can import this package.
"""
