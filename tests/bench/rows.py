"""Measure how many rows a second and core become examples: with `dataset.make_examples`, which tokenises row by row,
and with `prepared_rows.prepare_rows`, in one process and with several.

Three kinds of rows are measured: prompts and completions as in the quickstart, conversations, and long texts. The
tokenizer is that of SmolLM2, with its chat template. For each kind, all ways are measured one after the other, in
several rounds, and the ratios are those of one round. The processor time counts all processes that took part, also
those that render chat templates. `FINETUNE_BENCH_ROWS` (default 20000) is the number of rows of a kind; of long texts a
tenth is taken.

    python -m tests.bench --only rows
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.demo.base_model import base_model
from finetune_core.api.dataset import DatasetSpec
from finetune_trainer.data.dataset import length_limit, make_examples
from finetune_trainer.data.prepared.piece_batches import BatchPieceTokenizer
from finetune_trainer.data.prepared.prepared_rows import prepare_rows
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, model_stop_ids, stop_ids, tokenize_functions

ROWS = int(os.environ.get("FINETUNE_BENCH_ROWS", "20000"))
ROUNDS = 3
DOCS = Path(__file__).parents[2] / "docs"
FIELD = "dataset.train"
GOAL_ROWS = 1_000_000 / 60 / 16
"""Rows a second and core that prepare a million rows in a minute on 16 cores."""
COLUMNS = ("rows", "tokens a row", "way", "rows/s a core", "tokens/s a core", "ratio", "ratios from to", "rows/s")
FORMS: Mapping[str, Mapping[str, Any]] = {
    "quickstart": {
        "promptCompletion": {
            "promptField": "sentence",
            "completionField": "meaning",
            "template": "Sentence: {prompt}\nMeaning: ",
        }
    },
    "conversations": {"messages": {}},
    "long texts": {"text": {}},
}
WAYS: Mapping[str, int | None] = {"row by row": None, "chunks": 0, "1 process": 1, "2 processes": 2}
"""The number of processes beside the first one. None stands for `make_examples`."""


@dataclass(frozen=True)
class Measured:
    """The figures of one preparation."""

    rows: int
    tokens: int
    processor_seconds: float
    """Of all processes that took part."""
    seconds: float
    digest: str

    @property
    def rate(self) -> float:
        """Rows a second and core."""
        return self.rows / self.processor_seconds


def made_rows(kind: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of a kind, made of the words of this project's documentation."""
    words = [word for page in sorted(DOCS.glob("*.md")) for word in page.read_text(encoding="utf-8").split()]
    rng = random.Random(kind)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    for _ in range(count):
        if kind == "quickstart":
            yield {"sentence": text(12, 24), "meaning": f"inform(name[{text(2, 2)}], length[{rng.randint(1, 30)} km])"}
        elif kind == "conversations":
            turns = [(text(10, 40), text(20, 80)) for _ in range(rng.choice((1, 1, 2, 3)))]
            roles = ("user", "assistant")
            yield {
                "messages": [
                    {"role": role, "content": content}
                    for turn in turns
                    for role, content in zip(roles, turn, strict=True)
                ]
            }
        else:
            yield {"text": text(400, 1200)}


def prepare(kind: str, path: Path, model: Path, processes: int | None) -> Measured:
    """Prepare the rows in ``path`` once, and return the figures. Call this function once in a process."""
    source, long_rows = {"s3": {"uri": "s3://bucket/rows.jsonl"}}, "Split" if kind == "long texts" else "Skip"
    dataset = DatasetSpec.model_validate(
        {"train": source, "format": FORMS[kind], "maxLength": 2048, "longRows": long_rows}
    )
    tokenizer, limit = load_tokenizer(model), length_limit(dataset, None)
    ends = stop_ids(tokenizer, dataset.format, model_stop_ids(model))
    rows, began, count = read_rows(path, FIELD), time.perf_counter(), 0
    before = _processor_seconds()
    if processes is None:
        tokenize = tokenize_functions(tokenizer, ends=ends)
        examples, _ = make_examples(rows, path.name, FIELD, dataset, tokenize, limit=limit)
        count = sum(1 for _ in path.open(encoding="utf-8"))
    else:
        tokenize = tokenize_functions(tokenizer, ends=ends, make_pieces=BatchPieceTokenizer)
        found = prepare_rows(rows, path.name, FIELD, dataset, tokenize, limit=limit, processes=processes)
        examples, count = found.examples, found.rows
    seconds = time.perf_counter() - began
    if tokenize.chat is not None:
        tokenize.chat.end()  # only the time of processes that have ended counts
    return Measured(count, sum(examples.lengths), _processor_seconds() - before, seconds, examples.digest)


def _processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def measured(kind: str, path: Path, model: Path, processes: int | None) -> Measured:
    """Return the figures of a preparation in a process of its own."""
    arguments = json.dumps([kind, str(path), str(model), processes])
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.rows", arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"error: the preparation failed:\n{done.stderr[-4000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def run() -> None:
    """Run the measurement and print its table."""
    model = base_model()
    table = Table(
        title=f"rows that become examples (median of {ROUNDS} rounds; the goal is {GOAL_ROWS:,.0f} rows/s a core)"
    )
    for column in (
        "rows",
        "tokens a row",
        "way",
        "rows/s a core",
        "tokens/s a core",
        "ratio",
        "ratios from to",
        "rows/s",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMS:
            path = Path(folder) / f"{kind.replace(' ', '-')}.jsonl"
            count = max(1, ROWS // 10) if kind == "long texts" else ROWS
            with path.open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in made_rows(kind, count))
            rounds = [{way: measured(kind, path, model, WAYS[way]) for way in WAYS} for _ in range(ROUNDS)]
            digests = {found.digest for each in rounds for found in each.values()}
            if len(digests) != 1:
                sys.exit(f"error: the ways made different examples of {kind}")
            for way in WAYS:
                ratios = sorted(each[way].rate / each["row by row"].rate for each in rounds)
                first = rounds[0][way]
                rate = statistics.median(each[way].rate for each in rounds)
                table.add_row(
                    kind,
                    f"{first.tokens / first.rows:.0f}",
                    way,
                    f"{rate:,.0f}",
                    f"{rate * first.tokens / first.rows:,.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{ratios[0]:.2f} {ratios[-1]:.2f}",
                    f"{statistics.median(each[way].rows / each[way].seconds for each in rounds):,.0f}",
                )
    Console(width=140).print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind, path, model, processes = json.loads(sys.argv[1])
        found = prepare(kind, Path(path), Path(model), processes)
        print(json.dumps(found.__dict__))
    else:
        run()
