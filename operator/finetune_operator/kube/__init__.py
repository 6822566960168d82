"""Access to the Kubernetes API server: the client with one method per request, the table of RBAC permissions, and the
fencing that keeps a former leader from writing.

Objects pass through here as dictionaries. Code that knows what the fields of an object mean for a job belongs in
`objects/`.
"""
