"""The one exception for what a person can put right: a wrong value in a job file, a data file or a bucket."""

from __future__ import annotations


class UserError(Exception):
    """A person's input is wrong or something that a person provides is missing.

    The message is shown as it is in the resource's status and on the terminal. It names the field or the file
    and says what it must be; it never holds a secret.
    """

    def __init__(self, subject: str, problem: str) -> None:
        """Join ``subject`` (a field path such as ``dataset.train`` or a file) and ``problem`` to one sentence."""
        self.subject = subject
        self.problem = problem
        super().__init__(f"{subject}: {problem}")
