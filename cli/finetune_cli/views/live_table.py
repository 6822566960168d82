"""The live table of `finetune watch` for several jobs, and the lines that stand for it in a log or a pipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from finetune_cli.state import state
from finetune_cli.terminal import SafeConsole, say
from finetune_cli.views.columns import ColumnTable
from finetune_cli.views.job_table import UNREADABLE, Listed, in_order, job_columns, job_rows
from finetune_cli.views.log_lines import new_lines
from finetune_cli.views.watch import REFRESH_PER_SECOND
from finetune_core.api.job import FineTuneJob

LINES_AROUND = 4
"""Lines of a terminal that the rows of jobs can't have: the headings, the summary, a notice, and the prompt."""


class JobsView(ABC):
    """Shows the states of several jobs, and notices about the connection."""

    @abstractmethod
    def show_jobs(self, jobs: Sequence[Listed]) -> None:
        """Show the newest states of all jobs."""

    @abstractmethod
    def show_notice(self, sentence: str) -> None:
        """Show ``sentence``, a message that is not about a job, for example that the connection is lost."""


class TableView(JobsView):
    """A table on the terminal that is redrawn in place several times a second."""

    def __init__(self, console: SafeConsole, *, namespaces: bool, place: str) -> None:
        self._jobs: Sequence[Listed] | None = None
        self._notice = ""
        self._namespaces = namespaces
        self._place = place
        self._live = Live(get_renderable=lambda: _Table(self), console=console, refresh_per_second=REFRESH_PER_SECOND)

    def __enter__(self) -> TableView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show_jobs(self, jobs: Sequence[Listed]) -> None:
        """Show ``jobs`` from the next redraw on. The notice about the connection is removed."""
        self._jobs, self._notice = in_order(jobs), ""

    def show_notice(self, sentence: str) -> None:
        """Draw ``sentence`` below the table until the next change of a job."""
        self._notice = sentence

    def table(self, now: datetime, height: int) -> RenderableType:
        """Return the table, with as many rows as fit into ``height`` lines."""
        jobs, notice = self._jobs, self._notice
        if jobs is None:
            return Text(notice or "looking for jobs", style="dim")
        if not jobs:
            return Text(f"no job in {self._place} yet; Ctrl-C ends")
        shown = jobs[: max(1, height - LINES_AROUND)]
        columns = job_columns(namespaces=self._namespaces, wide=False, message=True)
        rows = job_rows(shown, now, namespaces=self._namespaces, wide=False, message=True)
        counts = Text(summary(jobs, len(jobs) - len(shown)), style="dim")
        table = ColumnTable(columns, rows, one_line=True)
        return Group(table, counts, Text(notice, style="yellow")) if notice else Group(table, counts)


class _Table:
    """Draws the table of ``view`` for the height of the terminal."""

    def __init__(self, view: TableView) -> None:
        self._view = view

    def __rich_console__(self, console: object, options: ConsoleOptions) -> RenderResult:
        yield self._view.table(datetime.now(UTC), options.height or options.size.height)


class JobLinesView(JobsView):
    """Writes the changes of all jobs as lines, each with the time and the name of the job."""

    def __init__(self, write: Callable[[str], None], *, namespaces: bool) -> None:
        self._write = write
        self._namespaces = namespaces
        self._shown: dict[tuple[str, str], FineTuneJob | None] = {}

    def show_jobs(self, jobs: Sequence[Listed]) -> None:
        """Write the lines about what has changed since lines were last written."""
        there = {(listed.namespace, listed.name) for listed in jobs}
        for key in sorted(self._shown.keys() - there):
            del self._shown[key]
            self.show_notice(f"{self._name(*key)}  was deleted")
        for listed in sorted(jobs, key=lambda found: (found.namespace, found.name)):
            key = (listed.namespace, listed.name)
            if listed.job is None:
                if self._shown.get(key, listed) is not None:
                    self.show_notice(f"{self._name(*key)}  {UNREADABLE}: {listed.problem}")
                self._shown[key] = None
                continue
            lines = new_lines(self._shown.get(key), listed.job)
            for line in lines:
                self.show_notice(f"{self._name(*key)}  {line}")
            if lines or key not in self._shown:
                self._shown[key] = listed.job

    def show_notice(self, sentence: str) -> None:
        """Write ``sentence`` as a line, with the time."""
        self._write(f"{datetime.now():%H:%M:%S}  {sentence}")

    def _name(self, namespace: str, name: str) -> str:
        return f"{namespace}/{name}" if self._namespaces else name


def summary(jobs: Sequence[Listed], left_out: int) -> str:
    """Return how many jobs are in which state, the most frequent first, and how many are not shown."""
    states = Counter(state(listed.job) if listed.job is not None else UNREADABLE for listed in jobs)
    words = ", ".join(f"{count} {word}" for word, count in states.most_common())
    hidden = f"; {left_out} not shown, make the terminal taller or select with -l" if left_out else ""
    return f"{len(jobs)} job{'s' if len(jobs) > 1 else ''}: {words}{hidden}"


@contextmanager
def jobs_view_for(console: SafeConsole, *, namespaces: bool, place: str) -> Iterator[JobsView]:
    """Yield the view that suits ``console``: a live table for a terminal, otherwise lines on the standard output."""
    if console.is_terminal:
        with TableView(console, namespaces=namespaces, place=place) as live:
            yield live
    else:
        yield JobLinesView(say, namespaces=namespaces)
