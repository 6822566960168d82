"""Changes a job's objects in Kubernetes. As `decide/` has decided, it creates and deletes ConfigMaps, child objects and
preflight pods. It also annotates running pods with the time of the newest checkpoint.

One reconcile creates the objects of at most one attempt or one try of the preflight check, and may delete the
ConfigMap of the one before. `status/`, not this room, writes the status.
"""
