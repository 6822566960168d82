"""The package that operator, trainer and CLI share: the pydantic models of the FineTuneJob resource, the messages
between operator and training pods, the names of Kubernetes objects, and the keys of objects in the object store.

The package depends on pydantic only, because every training pod and every command imports it. A module that needs
Kubernetes, torch or an object store belongs into operator/, trainer_image/ or cli/.
"""
