"""The ViGGO grader gives every score to published answers. Each mutation of an answer loses the expected scores."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from finetune_core.tasks import VIGGO
from finetune_trainer.evaluation.graders.grades import GradeList
from finetune_trainer.evaluation.graders.viggo import (
    ATTRIBUTES,
    FUNCTIONS,
    LISTS,
    Attribute,
    Representation,
    grade,
    parse,
)
from tests.trainer.grading import left_out, unreadable

DATA = Path(os.environ.get("FINETUNE_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")) / "viggo"
OWN_ROWS = [
    "inform(name[Harbour Lights], exp_release_date[May 3, 2031], developer[Fern & Daughters, Inc.])",
    "give_opinion(name[Moss: A Keeper's Tale], esrb[E 10+ (for Everyone 10 and Older)], rating[good])",
    "inform(name[Tin [Remade]], genres[puzzle, hack-and-slash], platforms[PC, Console])",
    "request_attribute(esrb[])",
    'request(specifier["slow"])',
]
GOLD = "inform(name[Harbour Lights], rating[good], genres[puzzle, racing], platforms[])"


def scores(answer: str, gold: str = GOLD) -> set[str]:
    """Return the names of the scores that ``answer`` gets against the reference ``gold``."""
    return {name for name, right in grade(answer, {"mr": gold}).scores.items() if right}


def published() -> list[str]:
    if not DATA.is_dir():
        return OWN_ROWS
    paths = [DATA / f"viggo-{split}.csv" for split in ("train", "valid")]
    return OWN_ROWS + [row["mr"] for path in paths for row in csv.DictReader(path.open(encoding="utf-8"))]


def text(representation: Representation) -> str:
    attributes = ", ".join(f"{name}[{', '.join(values)}]" for name, values in representation.attributes)
    return f"{representation.function}({attributes})"


def test_every_published_row_parses_keeps_the_order_demanded_and_is_right_against_itself() -> None:
    rows = published()
    for row in rows:
        representation = parse(row)
        assert representation is not None, row
        assert text(representation) == row
        places = [ATTRIBUTES.index(attribute.name) for attribute in representation.attributes]
        assert places == sorted(set(places))
    grades = [grade(row, {"mr": row}) for row in rows]
    summary = GradeList.of(VIGGO, grades)
    assert (summary.graded, left_out(grades)) == (len(rows), {})
    assert summary.reported(VIGGO) == dict.fromkeys(VIGGO.score_names, 1.0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (GOLD, {"strict", "orderFree", "function", "attributes", "values"}),
        (
            f"  {GOLD.replace(', ', ' ,  ').replace('[', '[ ')}\n",
            {"strict", "orderFree", "function", "attributes", "values"},
        ),
        (
            "inform(rating[good], name[Harbour Lights], genres[puzzle, racing], platforms[])",
            {"orderFree", "function", "attributes", "values"},
        ),
        (GOLD.replace("puzzle, racing", "racing, puzzle"), {"orderFree", "function", "attributes", "values"}),
        (GOLD.replace("inform", "confirm"), {"attributes", "values"}),
        (GOLD.replace("inform", "Inform"), {"attributes", "values"}),
        (GOLD.replace("good", "poor"), {"function", "attributes"}),
        (GOLD.replace("good", "Good"), {"function", "attributes"}),
        (GOLD.replace("good", ""), {"function", "attributes"}),
        (GOLD.replace("good", '"good"'), {"function", "attributes"}),
        (GOLD.replace("platforms[]", "platforms[PC]"), {"function", "attributes"}),
        (GOLD.replace("puzzle, racing", "puzzle"), {"function", "attributes"}),
        (GOLD.replace("puzzle, racing", "puzzle, puzzle, racing"), {"function", "attributes"}),
        (
            GOLD.replace("name[Harbour Lights], rating[good]", "name[good], rating[Harbour Lights]"),
            {"function", "attributes"},
        ),
        (GOLD.replace(", rating[good]", ""), {"function"}),
        (GOLD.replace("rating[good]", "rating[good], rating[good]"), {"function"}),
        (GOLD.replace("rating[good]", "rating[good], esrb[T (for Teen)]"), {"function"}),
        (GOLD.replace("rating", "ratings"), {"function"}),
        (GOLD[:-1], {"function"}),
        (GOLD + " and more", {"function"}),
        (GOLD + GOLD, {"function"}),
        (GOLD.replace("], r", "] r"), {"function"}),
        (GOLD.replace("platforms[]", "platforms"), {"function"}),
        (GOLD.replace("good]", "good"), {"function"}),
        (GOLD[:-1] + ",)", {"function"}),
        ("The answer is " + GOLD, set()),
        ("", set()),
    ],
)
def test_each_mutation_costs_its_scores(answer: str, right: set[str]) -> None:
    assert scores(answer) == right


def test_a_comma_is_part_of_a_value_that_is_no_list() -> None:
    assert parse("inform(developer[Fern, Inc.], genres[a (b, c), d])") == Representation(
        "inform", (Attribute("developer", ("Fern, Inc.",)), Attribute("genres", ("a (b, c)", "d")))
    )
    gold = "inform(exp_release_date[May 3, 2031])"
    assert scores(gold.replace("May 3, 2031", "2031, May 3"), gold) == {"function", "attributes"}


@pytest.mark.parametrize("gold", ["inform(name[x]", "invite(name[x])", "inform(colour[red])", ""])
def test_a_gold_row_that_is_not_viggo_is_counted_apart(gold: str) -> None:
    grades = [grade(GOLD, {"mr": gold}), grade(GOLD, {}), grade(GOLD, {"mr": GOLD})]
    assert (GradeList.of(VIGGO, grades).graded, left_out(grades).total()) == (1, 2)


def test_lists_of_parts_join_to_the_list_of_all_answers() -> None:
    grades = [grade(answer, {"mr": GOLD}) for answer in (GOLD, GOLD.replace("good", "poor"), "inform(", "")]
    whole, nothing = GradeList.of(VIGGO, grades), GradeList.of(VIGGO, [])
    for parts in ((GradeList.of(VIGGO, grades[:1]), GradeList.of(VIGGO, grades[1:])), (whole, nothing)):
        assert GradeList.joined(VIGGO, parts) == whole
    assert {name: sum(values) for name, values in whole.values.items()} == {
        "strict": 1,
        "orderFree": 1,
        "function": 3,
        "attributes": 2,
        "values": 1,
    }
    assert unreadable(grades) == {"the answer is not a functional representation": 2}
    assert (whole.reported(VIGGO)["strict"], nothing.reported(VIGGO)) == (0.25, {})


words = st.text("abz'\"(.-: é0", min_size=1, max_size=8).filter(lambda word: word == " ".join(word.split()) != "")
balanced = words.filter(lambda word: "(" not in word)


@st.composite
def representations(draw: st.DrawFn) -> Representation:
    names = draw(st.lists(st.sampled_from(ATTRIBUTES), unique=True, min_size=1))
    attributes = []
    for name in names:
        values = draw(st.lists(balanced, max_size=3 if name in LISTS else 1))
        attributes.append(Attribute(name, tuple(values)))
    return Representation(draw(st.sampled_from(FUNCTIONS)), tuple(attributes))


@given(representations(), st.randoms())
def test_a_permutation_of_attributes_costs_the_strict_score_only(gold: Representation, random: object) -> None:
    order = list(gold.attributes)
    random.shuffle(order)  # type: ignore[attr-defined]
    answer = gold._replace(attributes=tuple(order))
    found = scores(text(answer), text(gold))
    assert found - {"strict"} == {"orderFree", "function", "attributes", "values"}
    assert ("strict" in found) == (answer == gold)


@given(representations(), st.data())
def test_a_changed_value_is_always_noticed(gold: Representation, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(gold.attributes) - 1))
    old = gold.attributes[place]
    values = tuple(data.draw(st.lists(balanced, max_size=3 if old.name in LISTS else 1)))
    assume(sorted(values) != sorted(old.values))
    changed = (*gold.attributes[:place], Attribute(old.name, values), *gold.attributes[place + 1 :])
    assert scores(text(gold._replace(attributes=changed)), text(gold)) == {"function", "attributes"}


@given(st.text("inform(name[x], )]\"'é\n"))
def test_no_text_makes_the_grader_fail(answer: str) -> None:
    assert grade(answer, {"mr": GOLD}).is_graded
