"""What the CLI reads from the API server and changes there: jobs, and the objects of the cluster that belong to a job.

Everything that sends a request to the API server belongs here. What a terminal shows of the answers belongs to
`views/`.
"""
