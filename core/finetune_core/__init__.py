"""The package that operator, trainer and CLI share. It contains the pydantic models of the FineTuneJob resource, the
validation of jobs, the declarations of tasks, the messages between operator and training pods, the names of Kubernetes
objects, and the keys of objects in the object store.

A module that every training pod or every command imports needs no library except pydantic. Code that needs torch, or a
client of Kubernetes or of an object store, is in operator/, trainer_image/ or cli/.
"""
