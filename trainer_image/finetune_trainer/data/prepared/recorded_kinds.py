"""Records which kinds of fields a chat template was seen to render while a chunk of rows was rendered.

The renderer of conversations checks each kind once, and lets later rows pass. So what a row becomes may depend on the
rows before it, if the template treats rows of one kind in different ways. `chunk_outcomes.py` uses this module to
render a chunk without the rows before it, and `prepared_rows.py` to find out whether these rows would have made a
difference.
"""

from __future__ import annotations

from collections.abc import Set

Kind = tuple[object, ...]


class RecordedKinds:
    """The kinds that are known at the beginning of a chunk, and those that are found in it (`ShownKinds`)."""

    def __init__(self, known: Set[Kind] = frozenset()) -> None:
        """Begin with the kinds ``known``."""
        self._known = known
        self._asked: Kind | None = None
        self.found: set[Kind] = set()
        """Kinds that were not known, and that the template was seen to render."""
        self._failed: set[Kind] = set()

    def __contains__(self, kind: object) -> bool:
        """Return whether ``kind`` was known or found. If it was not, the caller checks it next, and adds it unless the
        check fails."""
        assert isinstance(kind, tuple)
        self._note_failure()
        if kind in self._known or kind in self.found:
            return True
        self._asked = kind
        return False

    def add(self, kind: Kind) -> None:
        """Note that the template renders ``kind``."""
        self.found.add(kind)
        self._asked = None

    @property
    def failed(self) -> Set[Kind]:
        """Kinds whose check did not succeed in at least one row. A row with such a kind may become something else if
        the kind is known before the row."""
        self._note_failure()
        return self._failed

    def _note_failure(self) -> None:
        if self._asked is not None:
            self._failed.add(self._asked)
            self._asked = None
