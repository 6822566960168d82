"""Decisions about training as pure functions of steps and losses: learning rate, best evaluation, alarms, rollbacks.

No module here talks to another rank or to the bucket.
"""
