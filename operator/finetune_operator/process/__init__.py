"""What the operator's process needs around its work: settings, logging, leader election, health endpoints, metrics and
the base class of its HTTP servers.

Nothing here knows how a job is reconciled.
"""
