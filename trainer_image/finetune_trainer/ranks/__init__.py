"""The ranks of an attempt: rendezvous and collectives, errors that travel between ranks, errors from lack of memory,
the watchdog, and environment and device of a rank's process.

The code with which the launcher supervises the worker processes is not here, but in `finetune_trainer/processes.py`.
"""
