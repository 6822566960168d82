"""Changes the objects of a job as `decide/` has decided: creates and deletes ConfigMaps, children and preflight pods.

One reconcile changes the objects of one attempt or one try at most. The status is not written here but in `status/`.
"""
