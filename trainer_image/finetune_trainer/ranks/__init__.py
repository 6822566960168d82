"""The ranks of an attempt: rendezvous and collectives, errors that travel between ranks, the watchdog, and environment
and device of a rank's process.

The launcher's supervision of worker processes belongs in `processes.py`.
"""
