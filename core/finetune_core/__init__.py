"""The package that operator, trainer and CLI share. It contains the pydantic models of the FineTuneJob resource, the
validation of jobs, the messages between operator and training pods, the names of Kubernetes objects, and the keys of
objects in the object store.

The modules that every training pod and every command imports need no library except pydantic. Modules that need torch,
or a client of Kubernetes or of an object store, must be in operator/, trainer_image/ or cli/.
"""
