"""Of two writes, the observer (see rows/observer.py) never gives the earlier write the later time, even if one of its
watches lags behind the other."""

from __future__ import annotations

from tests.e2e.rows.observer import Timeline


def test_a_write_that_arrives_late_is_dated_by_the_later_write_that_was_seen_before() -> None:
    timeline = Timeline()
    assert timeline.date(100, 1.0) == 1.0
    assert timeline.date(103, 2.0) == 2.0
    assert timeline.date(101, 2.7) == 2.0, "the deletion came before the status that tells of it"
    assert timeline.date(104, 3.0) == 3.0
    assert timeline.date(99, 3.5) == 1.0
    assert timeline.date(104, 4.0) == 3.0
