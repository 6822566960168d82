"""`make unit ROOM=graders` runs the tests of one room. Every room of the packages has tests that run without a
cluster."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.rooms import REPOSITORY, TESTS, RoomError, groups_of_tests, rooms_of_packages, unit_test_files


@pytest.mark.parametrize("room", rooms_of_packages())
def test_every_room_of_the_packages_has_tests_that_need_no_cluster(room: str) -> None:
    assert unit_test_files(room)


def test_a_room_has_the_test_files_that_import_it_and_no_others() -> None:
    files = {file.name for file in unit_test_files("graders")}
    assert {"test_tasks_gsm8k.py", "test_tasks_sql.py", "test_tasks_viggo.py"} <= files
    assert "test_chart.py" not in files


def test_a_room_that_is_used_through_the_top_of_a_package_has_the_tests_of_its_user() -> None:
    """`test_crashes.py` imports `tests/operator/operators.py`, which imports `finetune_operator/reconcile.py`, which
    imports the room `act`."""
    assert TESTS / "operator" / "test_crashes.py" in unit_test_files("act")


def test_a_folder_of_tests_is_a_room_too() -> None:
    files = unit_test_files("chart")
    assert [file.parent.name for file in files] == ["chart"]
    assert {"operator", "trainer"} <= set(groups_of_tests())


def test_an_unknown_room_gets_the_list_of_rooms() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rooms", "kitchen"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("there is no room 'kitchen'; the rooms are: ")
    assert {"graders", "decide", "storage", "chart"} <= set(done.stderr.partition("are: ")[2].strip().split(", "))
    assert done.stdout == ""


def test_a_room_whose_tests_all_need_the_cluster_says_how_to_run_them() -> None:
    with pytest.raises(
        RoomError, match=r"every test of 'faults' needs the cluster or is long; run: .* tests/faults/test_crashes.py"
    ):
        unit_test_files("faults")


@pytest.mark.parametrize(
    "package",
    ["core/finetune_core", "operator/finetune_operator", "trainer_image/finetune_trainer", "cli/finetune_cli"],
)
def test_no_two_modules_of_a_package_have_the_same_name(package: str) -> None:
    """The name of a module without its folder must identify a single file in the package."""
    names = Counter(path.stem for path in Path(REPOSITORY, package).rglob("*.py") if not path.stem.startswith("__"))
    assert [name for name, count in names.items() if count > 1] == []
