"""Changes a job's objects in Kubernetes: creates and deletes ConfigMaps, NetworkPolicies, child objects and preflight
pods, deletes orphaned pods, and annotates running pods with the time of the newest checkpoint.

`decide/` decides what is created and deleted for a job that goes on, and `settled.py` what is deleted for an ended job.
One reconcile creates the objects of at most one attempt or one try of the preflight check. Right before, the reconcile
deletes the ConfigMap (and NetworkPolicy) of the previous attempt or try, if these objects still exist. The status is
written by `status/`, not here.
"""
