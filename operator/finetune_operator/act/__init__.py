"""Changes a job's objects in Kubernetes. As `decide/` has decided, it creates and deletes ConfigMaps, NetworkPolicies,
child objects and preflight pods. It also annotates running pods with the time of the newest checkpoint.

One reconcile creates the objects of at most one attempt or one try of the preflight check. Before that it deletes the
ConfigMap (and NetworkPolicy) of the attempt or try before, where they still exist. The status is written by `status/`,
not here.
"""
