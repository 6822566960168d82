"""Changes a job's objects in Kubernetes, as `decide/` has decided: creates and deletes ConfigMaps, NetworkPolicies,
child objects and preflight pods. Also annotates running pods with the time of the newest checkpoint.

One reconcile creates the objects of at most one attempt or one try of the preflight check. Right before, the reconcile
deletes the ConfigMap (and NetworkPolicy) of the previous attempt or try, if these objects still exist. The status is
written by `status/`, not here.
"""
