"""Generates the demo's data: sentences about hiking trails, each with its functional representation.

The input is a seed and the numbers of rows. The output is `train.jsonl`, `validation.jsonl` and `heldout.jsonl` with
the fields `sentence` and `meaning`. `make demo` and the end-to-end tests call `generate`. To write the files yourself:

    python -m examples.trails.generate --output /tmp/trails

The task resembles ViGGO (Juraska et al. 2019), but has a vocabulary of its own with five functions and six attributes.
A meaning lists its attributes in a fixed order. A sentence may name the attributes in another order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

FIRST_WORDS = (
    "Pine", "Otter", "Eagle", "Silver", "Copper", "Maple", "Granite", "Heron",
    "Cedar", "Fox", "Raven", "Willow", "Amber", "Stone", "Birch", "Marble",
)  # fmt: skip
SECOND_WORDS = ("Ridge", "Falls", "Hollow", "Pass", "Loop", "Canyon", "Meadow", "Summit")

VALUES: dict[str, tuple[str, ...]] = {
    "length": tuple(f"{kilometres} km" for kilometres in range(3, 25)),
    "climb": tuple(f"{metres} m" for metres in range(150, 1000, 50)),
    "difficulty": ("easy", "moderate", "hard"),
    "view": ("lake", "valley", "glacier", "coast", "forest"),
    "dogs": ("yes", "no"),
}
"""For each attribute except `name`, its possible values. After the name, a meaning lists its attributes in this
order."""

PHRASES: dict[str, tuple[str, ...]] = {
    "length": ("it is {value} long", "it runs for {value}"),
    "climb": ("it climbs {value}", "it gains {value}"),
    "difficulty": ("it is {value}", "the going is {value}"),
    "view": ("it looks over the {value}", "it shows you the {value}"),
}
"""For each attribute except `name` and `dogs`, the clauses that can express it in a sentence."""
DOGS_PHRASES: dict[str, tuple[str, ...]] = {
    "yes": ("dogs are welcome", "you can bring your dog"),
    "no": ("dogs are not allowed", "leave your dog at home"),
}

SENTENCES: dict[str, tuple[str, ...]] = {
    "inform": ("{name}: {details}.", "About {name}, {details}."),
    "recommend": ("You should try {name}, {details}.", "I suggest {name}, {details}."),
    "confirm": ("You mean {name}, {details}, right?", "So {name}, {details}, correct?"),
    "warn": ("Careful on {name}, {details}.", "Beware of {name}, {details}."),
    "review": ("We loved {name}, {details}.", "I enjoyed {name}, {details}."),
}
"""For each of the five functions, the templates of its sentences."""

T = TypeVar("T")
Shape = tuple[str, tuple[str, ...]]
"""A function, and the names of the attributes that a row has in addition to `name`, for example `("inform", ("length",
"view"))`."""


@dataclass(frozen=True, slots=True)
class Trail:
    """The content of a row: a function, the name of a trail, and the trail's other attributes with their values."""

    function: str
    name: str
    attributes: tuple[tuple[str, str], ...]

    @property
    def shape(self) -> Shape:
        """The function, and the names of the attributes without their values."""
        return self.function, tuple(attribute for attribute, _ in self.attributes)

    @property
    def meaning(self) -> str:
        """The functional representation, for example `inform(name[Pine Ridge], length[12 km], difficulty[hard])`."""
        said = [("name", self.name), *self.attributes]
        return f"{self.function}({', '.join(f'{attribute}[{value}]' for attribute, value in said)})"


@dataclass(frozen=True, slots=True)
class Rows:
    """The three sets of rows. No meaning occurs in two sets.

    The held-out rows are new combinations of known parts. No training row has both the function and the attributes of a
    held-out row, and no training row has the name of a held-out row. With the default numbers of rows, every word of a
    name, every function and every attribute occurs in some training row.
    """

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    heldout: list[dict[str, str]]


def generate(seed: int = 7, *, train: int = 800, validation: int = 60, heldout: int = 40) -> Rows:
    """Return the three sets. ``train``, ``validation`` and ``heldout`` are their numbers of rows. With the same seed
    and numbers, the rows are the same on every machine."""
    chance = random.Random(seed)
    shapes = [(function, attributes) for function in SENTENCES for attributes in _attribute_sets()]
    names = [f"{first} {second}" for first, second in itertools.product(FIRST_WORDS, SECOND_WORDS)]
    new_shapes, known_shapes = _split(shapes, len(shapes) // 5, chance)
    new_names, known_names = _split(names, len(names) // 5, chance)
    known = _distinct(train + validation, known_shapes, known_names, chance)
    new = _distinct(heldout, new_shapes, new_names, chance)
    rows = [_row(trail, chance) for trail in [*known, *new]]
    return Rows(rows[:train], rows[train : train + validation], rows[train + validation :])


def write(rows: Rows, folder: Path) -> None:
    """Write each set of ``rows`` into a file in ``folder``, such as `train.jsonl`. The folder is created if it does not
    exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "heldout"):
        lines = (json.dumps(row) + "\n" for row in getattr(rows, name))
        (folder / f"{name}.jsonl").write_text("".join(lines))


def _attribute_sets() -> Iterator[tuple[str, ...]]:
    """Yield every set of one or two attributes. The attribute `name` is in no set. Two attributes are in the order in
    which a meaning lists them."""
    for size in (1, 2):
        yield from itertools.combinations(VALUES, size)


def _split(items: Sequence[T], number: int, chance: random.Random) -> tuple[list[T], list[T]]:
    """Return ``number`` randomly chosen items, and the other items."""
    shuffled = chance.sample(items, len(items))
    return shuffled[:number], shuffled[number:]


def _distinct(number: int, shapes: Sequence[Shape], names: Sequence[str], chance: random.Random) -> list[Trail]:
    """Return ``number`` trails with different meanings. ``shapes`` are used in turn, so that all of them are about
    equally frequent. Names and values are chosen at random."""
    trails: dict[str, Trail] = {}
    turns = itertools.cycle(shapes)
    while len(trails) < number:
        function, attributes = next(turns)
        said = tuple((attribute, chance.choice(VALUES[attribute])) for attribute in attributes)
        trail = Trail(function, chance.choice(names), said)
        trails.setdefault(trail.meaning, trail)
    found = list(trails.values())
    chance.shuffle(found)
    return found


def _row(trail: Trail, chance: random.Random) -> dict[str, str]:
    """Return the row of a trail: its sentence, with the attributes in random order, and its meaning."""
    details = [_phrase(attribute, value, chance) for attribute, value in trail.attributes]
    chance.shuffle(details)
    sentence = chance.choice(SENTENCES[trail.function]).format(name=trail.name, details=" and ".join(details))
    return {"sentence": sentence, "meaning": trail.meaning}


def _phrase(attribute: str, value: str, chance: random.Random) -> str:
    """Return a clause that expresses that ``attribute`` has ``value``, for example `it is 12 km long`."""
    if attribute == "dogs":
        return chance.choice(DOGS_PHRASES[value])
    return chance.choice(PHRASES[attribute]).format(value=value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files into the folder that the command line names. Print the number of rows in each file, and the
    folder."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.trails.generate",
        description="Make sentences about hiking trails with their functional representations (jsonl).",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the three files go")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same rows (default: %(default)s)")
    parser.add_argument("--train", type=int, default=800, metavar="ROWS", help="training rows (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=60, metavar="ROWS", help="default: %(default)s")
    parser.add_argument("--heldout", type=int, default=40, metavar="ROWS", help="default: %(default)s")
    options = parser.parse_args(arguments)
    rows = generate(options.seed, train=options.train, validation=options.validation, heldout=options.heldout)
    write(rows, options.output)
    print(f"{len(rows.train)} training, {len(rows.validation)} validation, {len(rows.heldout)} held-out rows")
    print(f"in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
