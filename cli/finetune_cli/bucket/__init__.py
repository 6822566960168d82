"""What the CLI reads from a job's object store: checkpoints and the artifact.

Everything that sends a request to an object store belongs here.
"""
