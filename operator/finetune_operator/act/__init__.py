"""Changes a job's objects as `decide/` has decided: creates and deletes ConfigMaps, child objects and preflight pods.

One reconcile changes the objects of at most one attempt or one try of the preflight check. `status/`, not this room,
writes the status.
"""
