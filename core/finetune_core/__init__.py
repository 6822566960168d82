"""What operator, trainer and CLI share: the models of the resource, the contract between operator and pods, and names.

The package depends on pydantic only, because every training pod and every command imports it. A module that needs
Kubernetes, torch or an object store belongs into operator/, trainer_image/ or cli/.
"""
