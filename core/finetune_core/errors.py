"""The exception for problems that a user can correct, such as a wrong value in a job file or a missing data file."""

from __future__ import annotations


def valid_text(text: str) -> str:
    """Return ``text`` with an escape such as ``\\ud800`` in place of each half of a surrogate pair.

    JSON files, chat templates and file names can contain such halves. A text that contains one can't be encoded as
    UTF-8, so it can't be written into a file, a log or a message.
    """
    return text.encode("utf-8", "backslashreplace").decode()


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
        super().__init__(valid_text(f"{subject}: {problem}"))
