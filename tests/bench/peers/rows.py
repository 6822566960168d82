"""The rows on which the compared programs train. They come from the training rows of the data set GSM8K, in the file
`../shared/data/gsm8k/train.jsonl` beside the checkout.

If that file does not exist, random words replace GSM8K: questions of about 60 words, and answers of about 55 words that
end with `#### number`, as in GSM8K.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

REAL = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "train.jsonl"
WORDS = "she buys seven boxes of apples each day and sells half of them at noon for two dollars how many are left"


def gsm8k_rows(count: int) -> list[dict[str, str]]:
    """Return ``count`` rows of GSM8K, or random rows if the data set is missing. Each row has the fields `question` and
    `answer`."""
    if REAL.is_file():
        with REAL.open() as file:
            return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
    generator = random.Random(0)
    return [_made_up(generator) for _ in range(count)]


def _made_up(generator: random.Random) -> dict[str, str]:
    def text(mean: int) -> str:
        return " ".join(generator.choices(WORDS.split(), k=max(15, int(generator.gauss(mean, mean / 3)))))

    return {"question": text(60), "answer": f"{text(55)} #### {generator.randrange(1000)}"}


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write ``rows`` as a JSON Lines file and return the file's path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
