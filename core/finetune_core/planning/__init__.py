"""Computes numbers about a training: batch sizes, the ZeRO stage, the number of steps, and FLOPs.

All functions are pure and need neither torch nor a cluster, so that every part of the project can import this package.
"""
