"""The Kubernetes objects of a job: how each is built from the spec, and how pods and child objects are read back.

Builders are pure functions from a job to a manifest; `observations.py` parses manifests into values. `decide/` decides
when an object is created or deleted, and `act/` creates and deletes it.
"""
