"""The Kubernetes objects of a job: how each is built from the spec, and how pods and child objects are read back.

Builders are pure functions from a job to a manifest. `observations.py` parses pods into values, and each backend parses
its child objects. `decide/` decides when an object is created or deleted, and `act/` creates and deletes it.
`settled.py` removes the objects of an ended job.
"""
