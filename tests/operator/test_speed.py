"""The remaining time that the operator estimates from reported steps, and when it may write new numbers to the status.

Each test sets the clock itself.
"""

from __future__ import annotations

import pytest

from finetune_core.api.status import ProgressStatus
from finetune_operator.queue.memory import JobMemory
from finetune_operator.queue.speed import WINDOW, StepWindow, eta_seconds
from tests.operator.builders import NOW


def stored(step: int, total: int, eta: int | None) -> ProgressStatus:
    return ProgressStatus(step=step, total_steps=total, percentage=0, eta_seconds=eta, last_update_time=NOW)


def test_the_speed_is_taken_over_the_window_and_pauses_count() -> None:
    window = StepWindow()
    for now, step in [(0.0, 10), (3.0, 11), (3.0, 11), (60.0, 11), (66.0, 12)]:
        window.add(now, step)
    assert window.seconds_per_step() == 33


def test_old_steps_leave_the_window() -> None:
    window = StepWindow()
    for step in range(WINDOW + 1):
        window.add(100.0 * step, step)
    for step in range(WINDOW + 1, 2 * WINDOW + 1):
        window.add(100.0 * WINDOW + (step - WINDOW), step)
    assert window.seconds_per_step() == 1


def test_one_report_tells_no_speed() -> None:
    window = StepWindow()
    assert window.seconds_per_step() is None
    window.add(0.0, 5)
    assert window.seconds_per_step() is None


def test_the_speed_outlives_a_resume_until_the_new_attempt_has_its_own() -> None:
    window = StepWindow()
    window.add(0.0, 10)
    window.add(20.0, 20)
    window.add(500.0, 15)  # the trainer resumed from an earlier checkpoint, so the pause is no training time
    assert window.seconds_per_step() == 2
    window.add(505.0, 16)
    assert window.seconds_per_step() == 5


@pytest.mark.parametrize(
    ("known", "progress", "expected"),
    [
        (2.0, None, 80),
        (2.0, stored(50, 100, 5), 80),
        # a restarted operator has not measured a speed, so it derives one from the stored status
        (None, stored(50, 100, 100), 80),
        (None, stored(50, 100, None), None),
        (None, stored(100, 100, 0), None),
        (None, None, None),
    ],
)
def test_the_remaining_time(known: float | None, progress: ProgressStatus | None, expected: int | None) -> None:
    assert eta_seconds(60, 100, known, progress) == expected


def test_a_job_at_its_end_takes_no_more_time() -> None:
    assert eta_seconds(120, 100, 2.0, None) == 0


def test_new_numbers_of_a_job_wait_for_its_ten_seconds_and_for_their_place() -> None:
    memory = JobMemory()
    assert memory.seconds_to_progress_write(100.0) == 0
    memory.status_written_at = 100.0
    assert memory.seconds_to_progress_write(104.0) == 6
    memory.progress_write_at = 115.0
    assert memory.seconds_to_progress_write(104.0) == 11
    assert memory.seconds_to_progress_write(115.0) == 0
    memory.reported_write_at = 120.0
    assert memory.seconds_to_progress_write(115.0) == 5
