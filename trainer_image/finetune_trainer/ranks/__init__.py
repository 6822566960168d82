"""The ranks of an attempt: rendezvous and collectives, errors between ranks, watchdog, and the process around torch.

The launcher's supervision of worker processes belongs in `processes.py`.
"""
