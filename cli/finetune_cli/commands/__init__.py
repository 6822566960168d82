"""The commands of the program: one module for each, with its options, its help and what it does.

A command asks `apiserver/` and `bucket/`, shows the answer with `views/`, and returns the exit code. The commands
`validate` and `plan` only have their options here, because `jobfiles/` does their work.
"""
