"""The object store: client with retries, run numbers and fence, checkpoints, artifact, step log. Free of torch."""
