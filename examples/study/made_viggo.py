"""Makes rows of ViGGO's kind: sentences about video games that do not exist, each with its meaning.

`rows.py` calls `rows`. Functions and attributes are those of ViGGO (Juraska et al. 2019), so that the grader of the
task reads the rows. Names, values and sentences were written for this file.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

FIRST_WORDS = (
    "Iron", "Hollow", "Crimson", "Silent", "Frozen", "Golden", "Broken", "Distant",
    "Electric", "Hidden", "Burning", "Lunar", "Rusty", "Velvet", "Wandering", "Paper",
)  # fmt: skip
SECOND_WORDS = (
    "Harbor", "Empire", "Signal", "Garden", "Voyage", "Arena", "Mirage", "Lantern",
    "Circuit", "Kingdom", "Orchard", "Tide", "Outpost", "Carnival", "Compass", "Reactor",
)  # fmt: skip
DEVELOPERS = ("Blue Kettle Games", "Nine Owls", "Tall Tale Studio", "Copper Fern", "Lowtide Works", "Third Lamp")
GENRES = ("puzzle", "strategy", "role-playing", "shooter", "platformer", "simulation", "adventure", "sport")
PLATFORMS = ("PC", "PlayStation", "Xbox", "Nintendo Switch")
RATINGS = ("excellent", "good", "average", "poor")
ESRB = ("E (for Everyone)", "T (for Teen)", "M (for Mature)")
PERSPECTIVES = ("first person", "third person", "side view", "bird view")
YEARS = range(1998, 2020)

Row = dict[str, str]
Attributes = list[tuple[str, str]]


def rows(chance: random.Random) -> Iterator[Row]:
    """Yield rows with the columns `text` and `meaning`, without end. A meaning may occur again."""
    makers: tuple[Callable[[random.Random], tuple[str, str, Attributes]], ...] = (
        _inform,
        _opinion,
        _confirm,
        _recommend,
        _verify,
        _suggest,
        _request_attribute,
        _request,
    )
    while True:
        function, text, attributes = chance.choice(makers)(chance)
        said = ", ".join(f"{name}[{value}]" for name, value in attributes)
        yield {"text": text, "meaning": f"{function}({said})"}


def _name(chance: random.Random) -> str:
    return f"{chance.choice(FIRST_WORDS)} {chance.choice(SECOND_WORDS)}"


def _several(values: tuple[str, ...], chance: random.Random) -> list[str]:
    """Return one or two of ``values`` in the order in which they are listed."""
    chosen = chance.sample(values, chance.choice((1, 2)))
    return sorted(chosen, key=values.index)


def _inform(chance: random.Random) -> tuple[str, str, Attributes]:
    name, year, genres = _name(chance), str(chance.choice(YEARS)), _several(GENRES, chance)
    platforms, steam = _several(PLATFORMS, chance), chance.choice(("yes", "no"))
    shop = "You can get it on Steam." if steam == "yes" else "It is not available on Steam."
    text = chance.choice((
        f"{name} is a {' and '.join(genres)} game for {' and '.join(platforms)} from {year}. {shop}",
        f"{name} came out in {year} for {' and '.join(platforms)}, and is a {' and '.join(genres)} game. {shop}",
    ))  # fmt: skip
    return "inform", text, [
        ("name", name),
        ("release_year", year),
        ("genres", ", ".join(genres)),
        ("platforms", ", ".join(platforms)),
        ("available_on_steam", steam),
    ]  # fmt: skip


def _opinion(chance: random.Random) -> tuple[str, str, Attributes]:
    name, developer, rating = _name(chance), chance.choice(DEVELOPERS), chance.choice(RATINGS)
    said = {
        "excellent": ("is one of the best games that I know", "is a masterpiece"),
        "good": ("is a good game", "was fun to play"),
        "average": ("is nothing special", "is an average game"),
        "poor": ("is a bad game", "bored me to death"),
    }[rating]
    text = chance.choice((
        f"{name} by {developer} {chance.choice(said)}.",
        f"I think that {name}, which {developer} made, {chance.choice(said)}.",
    ))  # fmt: skip
    return "give_opinion", text, [("name", name), ("developer", developer), ("rating", rating)]


def _confirm(chance: random.Random) -> tuple[str, str, Attributes]:
    name, year, developer = _name(chance), str(chance.choice(YEARS)), chance.choice(DEVELOPERS)
    text = chance.choice((
        f"Do you mean {name}, the {year} game from {developer}?",
        f"Oh, so you are talking about {name}, which {developer} released in {year}?",
    ))  # fmt: skip
    return "confirm", text, [("name", name), ("release_year", year), ("developer", developer)]


def _recommend(chance: random.Random) -> tuple[str, str, Attributes]:
    name, genre, view = _name(chance), chance.choice(GENRES), chance.choice(PERSPECTIVES)
    text = chance.choice((
        f"Have you tried {name}? It is a {genre} game that you play in {view}.",
        f"Since you like {genre} games in {view}, have you heard of {name}?",
    ))  # fmt: skip
    return "recommend", text, [("name", name), ("genres", genre), ("player_perspective", view)]


def _verify(chance: random.Random) -> tuple[str, str, Attributes]:
    name, rating, multiplayer = _name(chance), chance.choice(RATINGS), chance.choice(("yes", "no"))
    mode = "has multiplayer" if multiplayer == "yes" else "has no multiplayer"
    text = chance.choice((
        f"You said that {name}, which {mode}, was {rating}. Is that still so?",
        f"So you found {name} {rating}, although it {mode}. Is that right?",
    ))  # fmt: skip
    return "verify_attribute", text, [("name", name), ("rating", rating), ("has_multiplayer", multiplayer)]


def _suggest(chance: random.Random) -> tuple[str, str, Attributes]:
    name, esrb = _name(chance), chance.choice(ESRB)
    text = chance.choice((
        f"Are you into games that are rated {esrb}, such as {name}?",
        f"Do you like to play games rated {esrb}, for example {name}?",
    ))  # fmt: skip
    return "suggest", text, [("name", name), ("esrb", esrb)]


def _request_attribute(chance: random.Random) -> tuple[str, str, Attributes]:
    attribute, text = chance.choice((
        ("developer", "Is there a developer whose games you like best?"),
        ("esrb", "Do you care about the age rating of a game?"),
        ("genres", "What kind of games do you like to play?"),
        ("platforms", "Which platform do you play on?"),
        ("player_perspective", "Which perspective do you like most in a game?"),
        ("available_on_steam", "Does it matter to you whether you can get a game on Steam?"),
        ("has_multiplayer", "Do you play games with others, or alone?"),
        ("release_year", "In which year did the games that you like come out?"),
    ))  # fmt: skip
    return "request_attribute", text, [(attribute, "")]


def _request(chance: random.Random) -> tuple[str, str, Attributes]:
    genre, word, year = (
        chance.choice(GENRES),
        chance.choice(("hardest", "strangest", "prettiest")),
        chance.choice(YEARS),
    )
    text = chance.choice((
        f"What is the {word} {genre} game from {year} that you have played?",
        f"Of the {genre} games from {year}, which one was the {word}?",
    ))  # fmt: skip
    return "request", text, [("release_year", str(year)), ("genres", genre), ("specifier", word)]
