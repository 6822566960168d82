"""Access to the Kubernetes API server: the client with one method per request, the table of RBAC permissions, and the
fencing that keeps a former leader from writing.

Requests and manifests pass through here as dictionaries. What they mean for a job belongs into `objects/`.
"""
