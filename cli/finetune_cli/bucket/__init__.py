"""What the CLI reads from a job's object store: checkpoints, the artifact and the step log.

Everything that sends a request to an object store belongs here.
"""
