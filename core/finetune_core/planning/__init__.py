"""Choices that a job leaves open: the ZeRO stage, the micro-batch, the number of steps."""
