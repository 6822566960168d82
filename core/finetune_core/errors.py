"""The exception for problems that a user can correct, such as a wrong value in a job file or a missing data file."""

from __future__ import annotations


class UserError(Exception):
    """A user's input is wrong, or something that the user must provide is missing.

    The message is shown unchanged in the resource's status and on the terminal. A message names the field or the file,
    says what the value must be, and never contains a secret.
    """

    def __init__(self, subject: str, problem: str) -> None:
        """Make the message ``<subject>: <problem>``. ``subject`` is the path of a field, such as ``dataset.train``, or
        the name of a file. ``problem`` says what the subject must be."""
        self.subject = subject
        self.problem = problem
        super().__init__(f"{subject}: {problem}")
