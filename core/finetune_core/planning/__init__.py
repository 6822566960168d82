"""Arithmetic about a training: batch sizes, the ZeRO stage, the number of steps, and FLOPs.

The functions are pure and need neither torch nor a cluster, so that operator, trainer and CLI can call them.
"""
