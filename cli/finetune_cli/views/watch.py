"""`finetune watch`: shows a FineTuneJob until it has ended.

The input is an iterator over the job's states. On a terminal the output is a panel that is redrawn. In a log or a pipe
the output is a line for each change. `commands/watch_command.py` and the demo call `show_until_ended`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from finetune_cli.state import Ending, ending
from finetune_cli.terminal import SafeConsole, say
from finetune_cli.views.log_lines import new_lines
from finetune_cli.views.panel import render
from finetune_core.api.job import FineTuneJob

REFRESH_PER_SECOND = 4


class View(ABC):
    """Shows the states of a job, and notices about the connection, to the user of `finetune watch`."""

    @abstractmethod
    def show_job(self, job: FineTuneJob) -> None:
        """Show the newest state of the job."""

    @abstractmethod
    def show_notice(self, sentence: str) -> None:
        """Show ``sentence``, a message that is not about the job, for example that the connection is lost."""


class LiveView(View):
    """A panel on the terminal that is redrawn in place several times a second, so that shown durations are current."""

    def __init__(self, console: SafeConsole) -> None:
        self._job: FineTuneJob | None = None
        self._notice = ""
        self._live = Live(
            get_renderable=self._renderable, console=console, refresh_per_second=REFRESH_PER_SECOND, transient=False
        )

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show_job(self, job: FineTuneJob) -> None:
        """Show ``job``, the newest state of the job, from the next redraw on. The notice about the connection is
        removed, because the connection works again."""
        self._job, self._notice = job, ""

    def show_notice(self, sentence: str) -> None:
        """Draw ``sentence`` below the panel until the next change of the job."""
        self._notice = sentence

    def _renderable(self) -> RenderableType:
        if self._job is None:
            return Text(self._notice or "looking for the job", style="dim")
        panel = render(self._job, datetime.now(UTC))
        return Group(panel, Text(self._notice, style="yellow")) if self._notice else panel


class LineView(View):
    """A view that writes the changes of the job as lines, each with the time."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._shown: FineTuneJob | None = None

    def show_job(self, job: FineTuneJob) -> None:
        """Write the lines that `new_lines` returns about ``job`` and the state for which lines were last written."""
        lines = new_lines(self._shown, job)
        for line in lines:
            self.show_notice(line)
        if lines:
            self._shown = job

    def show_notice(self, sentence: str) -> None:
        """Write ``sentence`` as a line, with the time."""
        self._write(f"{datetime.now():%H:%M:%S}  {sentence}")


@contextmanager
def view_for(console: SafeConsole) -> Iterator[View]:
    """Yield the view that suits ``console``: a live panel for a terminal, otherwise lines on the standard output."""
    if console.is_terminal:
        with LiveView(console) as live:
            yield live
    else:
        yield LineView(say)


def show_until_ended(jobs: Iterable[FineTuneJob], view: View) -> Ending:
    """Show each of ``jobs``, the states of a job, in ``view`` until the job has ended, and return how the job ended.
    Raises EOFError where there are no more states before the job has ended."""
    for job in jobs:
        view.show_job(job)
        if end := ending(job):
            return end
    raise EOFError("the stream of states ended before the job did")
