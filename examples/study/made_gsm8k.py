"""Makes rows of GSM8K's kind: word problems with a solution in steps, which ends in `####` and the number.

`rows.py` calls `rows`. The problems were written for this file; GSM8K (Cobbe et al. 2021) has the form of the answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

NAMES = ("Ada", "Bruno", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivan", "June", "Kofi", "Lena")
THINGS = ("apples", "stickers", "marbles", "books", "shells", "stamps", "pencils", "cards", "cookies", "beads")
PLACES = ("bakery", "library", "farm", "garage", "school", "harbor", "museum", "kiosk")

Row = dict[str, str]
Problem = tuple[str, list[str], int]
"""The question, the steps of the solution, and the number."""


def rows(chance: random.Random) -> Iterator[Row]:
    """Yield rows with the columns `question` and `answer`, without end. A row may occur again."""
    makers: tuple[Callable[[random.Random], Problem], ...] = (_gift, _shop, _trip, _groups, _savings, _half)
    while True:
        question, steps, number = chance.choice(makers)(chance)
        yield {"question": question, "answer": "\n".join([*steps, f"#### {number}"])}


def _gift(chance: random.Random) -> Problem:
    first, second = chance.sample(NAMES, 2)
    thing, owned, bags, each = chance.choice(THINGS), chance.randint(5, 60), chance.randint(2, 9), chance.randint(2, 9)
    given = chance.randint(1, owned)
    return (
        f"{first} has {owned} {thing} and buys {bags} bags with {each} {thing} each. Then {first} gives {given} {thing}"
        f" to {second}. How many {thing} does {first} have left?",
        [
            f"The bags hold {bags} * {each} = {bags * each} {thing}.",
            f"Together {first} has {owned} + {bags * each} = {owned + bags * each} {thing}.",
            f"After the gift {owned + bags * each} - {given} = {owned + bags * each - given} {thing} are left.",
        ],
        owned + bags * each - given,
    )


def _shop(chance: random.Random) -> Problem:
    name, place = chance.choice(NAMES), chance.choice(PLACES)
    (one, two), first, second = chance.sample(THINGS, 2), chance.randint(2, 12), chance.randint(2, 12)
    price, other = chance.randint(2, 15), chance.randint(2, 15)
    return (
        f"At the {place}, {name} buys {first} {one} at ${price} each and {second} {two} at ${other} each. How many"
        f" dollars does {name} pay?",
        [
            f"The {one} cost {first} * {price} = ${first * price}.",
            f"The {two} cost {second} * {other} = ${second * other}.",
            f"Together that is {first * price} + {second * other} = ${first * price + second * other}.",
        ],
        first * price + second * other,
    )


def _trip(chance: random.Random) -> Problem:
    name, hours, speed, more = chance.choice(NAMES), chance.randint(2, 8), chance.randint(8, 90), chance.randint(5, 60)
    return (
        f"{name} drives for {hours} hours at {speed} miles an hour, and then {more} miles more. How many miles does"
        f" {name} drive in all?",
        [
            f"In {hours} hours {name} drives {hours} * {speed} = {hours * speed} miles.",
            f"In all that is {hours * speed} + {more} = {hours * speed + more} miles.",
        ],
        hours * speed + more,
    )


def _groups(chance: random.Random) -> Problem:
    place, groups, size, away = (
        chance.choice(PLACES),
        chance.randint(3, 12),
        chance.randint(4, 20),
        chance.randint(1, 9),
    )
    return (
        f"{groups} classes of {size} children visit the {place}. {away} children are ill and stay at home. How many"
        " children come?",
        [
            f"The classes have {groups} * {size} = {groups * size} children.",
            f"Without the ill ones {groups * size} - {away} = {groups * size - away} children come.",
        ],
        groups * size - away,
    )


def _savings(chance: random.Random) -> Problem:
    name, weeks, week, spent = chance.choice(NAMES), chance.randint(4, 20), chance.randint(5, 30), chance.randint(5, 19)
    return (
        f"{name} saves ${week} a week for {weeks} weeks and then spends ${spent} on a present. How many dollars are"
        " left?",
        [
            f"{name} saves {week} * {weeks} = ${week * weeks}.",
            f"After the present {week * weeks} - {spent} = ${week * weeks - spent} are left.",
        ],
        week * weeks - spent,
    )


def _half(chance: random.Random) -> Problem:
    name, thing, half, days = chance.choice(NAMES), chance.choice(THINGS), chance.randint(3, 40), chance.randint(2, 6)
    return (
        f"{name} sells {2 * half} {thing} on Monday, and half as many on each of the next {days} days. How many {thing}"
        f" does {name} sell altogether?",
        [
            f"On each later day {name} sells {2 * half} / 2 = {half} {thing}.",
            f"On these {days} days that is {days} * {half} = {days * half} {thing}.",
            f"Altogether {name} sells {2 * half} + {days * half} = {(2 + days) * half} {thing}.",
        ],
        (2 + days) * half,
    )
