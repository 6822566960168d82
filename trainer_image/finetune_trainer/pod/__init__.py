"""What the launcher (PID 1 of a training pod) and its worker processes share: paths and time budgets, the worker plan,
exceptions, outcome files, heartbeats, signal handling and the container's cgroup.

Only what needs neither torch nor the object store belongs here, because every other room may import this one.
"""
