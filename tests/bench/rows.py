"""Measure how many rows a second and core become examples: with `dataset.make_examples`, which tokenises row by row,
and with `prepared_rows.prepare_rows`, in one process and with several.

Three kinds of rows are measured: prompts and completions as in the quickstart, conversations, and long texts. The
tokenizer is that of SmolLM2, with its chat template. For each kind, all ways are measured one after the other, each in
a process of its own, in several rounds, and a ratio compares two ways of one round. The processor time counts all
processes that took part, also those that render chat templates. `FINETUNE_BENCH_ROWS` (default 20000) is the number of
rows of the quickstart's kind, and `FINETUNE_BENCH_ROUNDS` (default 3) the number of rounds. Of the other kinds there
are fewer rows, because each has more tokens.

    python -m tests.bench --only rows
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from examples.demo.base_model import base_model
from finetune_core.api.dataset import DatasetSpec
from finetune_trainer.data.dataset import length_limit, make_examples
from finetune_trainer.data.prepared.chunk_workers import ChunkWorkers, SignOfLife
from finetune_trainer.data.prepared.conversation_batches import batch_functions
from finetune_trainer.data.prepared.prepared_rows import prepare_rows
from finetune_trainer.data.reader import read_rows
from finetune_trainer.data.tokenizer import load_tokenizer, model_stop_ids, stop_ids, tokenize_functions

ROWS = int(os.environ.get("FINETUNE_BENCH_ROWS", "20000"))
ROUNDS = int(os.environ.get("FINETUNE_BENCH_ROUNDS", "3"))
DOCS = Path(__file__).parents[2] / "docs"
FIELD = "dataset.train"
GOAL_ROWS = 1_000_000 / 60 / 16
"""Rows a second and core that prepare a million rows in a minute on 16 cores."""
COLUMNS = ("way", "rows/s a core", "tokens/s a core", "ratio", "ratios from to", "rows/s")
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
SHARES: Mapping[str, float] = {"quickstart": 1.0, "conversations": 0.2, "long texts": 0.1}
"""The number of rows of each kind, as a share of ROWS."""
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


class Workload(NamedTuple):
    """What is measured."""

    kind: str
    path: Path
    tokenizer: Any
    ends: Sequence[int]
    dataset: DatasetSpec

    @classmethod
    def of(cls, kind: str, path: Path, model: Path) -> Workload:
        """Return the workload of the rows in ``path``, with the tokenizer of ``model``."""
        long_rows = "Split" if kind == "long texts" else "Skip"
        dataset = DatasetSpec.model_validate(
            {
                "train": {"s3": {"uri": "s3://bucket/rows.jsonl"}},
                "format": FORMS[kind],
                "maxLength": 2048,
                "longRows": long_rows,
            }
        )
        tokenizer = load_tokenizer(model)
        return cls(kind, path, tokenizer, stop_ids(tokenizer, dataset.format, model_stop_ids(model)), dataset)

    def measured(self, processes: int | None) -> Measured:
        """Return the figures of a preparation, which runs in a forked process, so that its processes and its memory are
        its own."""
        with ChunkWorkers[int | None, Measured](1, self._prepare) as worker:
            ((_, found),) = worker.results([processes], lambda asked: asked)
        return found

    def _prepare(self, processes: int | None, alive: SignOfLife) -> Measured:
        rows, limit = read_rows(self.path, FIELD), length_limit(self.dataset, None)
        make_functions = tokenize_functions if processes is None else batch_functions
        tokenize = make_functions(self.tokenizer, ends=self.ends)
        began, before = time.perf_counter(), _processor_seconds()
        if processes is None:
            examples, _ = make_examples(rows, self.path.name, FIELD, self.dataset, tokenize, limit=limit)
        else:
            examples = prepare_rows(
                rows, self.path.name, FIELD, self.dataset, tokenize, limit=limit, processes=processes
            ).examples
        seconds = time.perf_counter() - began
        if tokenize.chat is not None:
            tokenize.chat.end()  # only the time of processes that have ended counts
        used = _processor_seconds() - before
        with self.path.open(encoding="utf-8") as file:
            count = sum(1 for _ in file)
        return Measured(count, sum(examples.lengths), used, seconds, examples.digest)


def _processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def table_of(kind: str, rounds: Sequence[Mapping[str, Measured]]) -> Table:
    """Return the table of a kind of rows. ``rounds`` has the figures of each way for each round."""
    first = rounds[0]["row by row"]
    tokens = first.tokens / first.rows
    table = Table(title=f"{kind}: {first.rows:,} rows of {tokens:.0f} tokens; goal: {GOAL_ROWS:,.0f} rows/s a core")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for way in WAYS:
        ratios = sorted(each[way].rate / each["row by row"].rate for each in rounds)
        rate = statistics.median(each[way].rate for each in rounds)
        table.add_row(
            way,
            f"{rate:,.0f}",
            f"{rate * tokens:,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f} {ratios[-1]:.2f}",
            f"{statistics.median(each[way].rows / each[way].seconds for each in rounds):,.0f}",
        )
    return table


def run() -> None:
    """Run the measurement and print a table for each kind of rows."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the trainer
    model = base_model()
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMS:
            path = Path(folder) / "rows.jsonl"
            with path.open("w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in made_rows(kind, int(ROWS * SHARES[kind])))
            workload = Workload.of(kind, path, model)
            rounds = [{way: workload.measured(WAYS[way]) for way in WAYS} for _ in range(ROUNDS)]
            if len({found.digest for each in rounds for found in each.values()}) != 1:
                sys.exit(f"error: the ways made different examples of {kind}")
            Console(width=120).print(table_of(kind, rounds))


if __name__ == "__main__":
    run()
