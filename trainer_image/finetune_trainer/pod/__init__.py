"""What the launcher (PID 1 of a training pod) and its worker processes share: paths and time budgets, the worker plan,
exceptions, outcome files, heartbeats, signal handlers, and the limits of the container. Also what several packages of
the trainer need: the names of a model's files, the reading of its JSON files and the search for a faulty field in them,
and ways to make imports cheaper.

Every other package of the trainer may import this one. So only code that needs neither torch nor the object store
belongs here.
"""
