"""The holes that graders have, each as one mutation of a right answer; the tasks' own tests go deeper."""

from __future__ import annotations

import pytest

from finetune_trainer.evaluation.graders import TASKS, Grade

MEANING = {"mr": "inform(name[Portal], genres[puzzle, shooter], rating[good])"}
NUMBER = {"answer": "12 x 80 = 960, and 40 more make 1,000.\n#### 1,000"}
TABLES = "CREATE TABLE boat (name VARCHAR, harbour VARCHAR, length INTEGER)"
FOUND = {"context": TABLES, "answer": "SELECT name FROM boat WHERE harbour = 'Quay'"}
SORTED = {"context": TABLES, "answer": "SELECT name FROM boat ORDER BY length DESC"}


def grade(task: str, answer: str, gold: dict[str, str]) -> Grade:
    return TASKS[task].grade(answer, gold)


@pytest.mark.parametrize(
    ("task", "gold", "answer", "right"),
    [
        # attributes in another order: not strict, but order-free
        ("ViGGO", MEANING, "inform(rating[good], name[Portal], genres[puzzle, shooter])", {"orderFree"}),
        ("ViGGO", MEANING, "inform(name[Portal], genres[puzzle, shooter], rating[good])", {"strict", "orderFree"}),
        ("ViGGO", MEANING, "inform(name[Portal], genres[puzzle], rating[good])", set()),
        ("ViGGO", MEANING, "inform(name[Portal], genres[puzzle, shooter], rating[good]) inform(name[Portal])", set()),
        # text after ####, and thousands with and without a comma
        ("GSM8K", NUMBER, "#### 1000", {"exact"}),
        ("GSM8K", NUMBER, "so #### $1,000. That is what is left.", {"exact"}),
        ("GSM8K", NUMBER, "#### 1,000,000", set()),
        ("GSM8K", NUMBER, "#### 10 or 1000", set()),
        ("GSM8K", NUMBER, "The answer is 1000", set()),
        # empty == empty must not count: the literal of the gold query is among the generated rows
        ("SQL", FOUND, "SELECT name FROM boat WHERE harbour = 'Nowhere'", set()),
        ("SQL", FOUND, "SELECT name FROM boat WHERE 1 = 0", set()),
        ("SQL", FOUND, "SELECT b.name FROM boat AS b WHERE b.harbour = 'Quay'", {"execution"}),
        # duplicates count, order only where the gold query orders
        ("SQL", FOUND, "SELECT name FROM boat WHERE harbour = 'Quay' UNION ALL SELECT name FROM boat", set()),
        ("SQL", FOUND, "SELECT name FROM boat WHERE harbour = 'Quay' ORDER BY name DESC", {"execution"}),
        ("SQL", SORTED, "SELECT name FROM boat ORDER BY length", set()),
        ("SQL", SORTED, "SELECT name FROM boat", set()),
    ],
)
def test_trap_25_holes_of_the_graders(task: str, gold: dict[str, str], answer: str, right: set[str]) -> None:
    scores = {name for name, value in grade(task, answer, gold).scores.items() if value}
    assert scores & {"strict", "orderFree", "exact", "execution"} == right
