"""A worker of `test_return_guard.py` whose training thread waits for ever in its third backward pass:
`python -m tests.trainer.hanging_worker PLAN_FILE LAUNCHER_PID`. Its guard has the patience of a guard on GPUs."""

from __future__ import annotations

import itertools
import sys
from typing import Any
from unittest import mock

from finetune_trainer import worker
from finetune_trainer.engine.engine import Engine
from finetune_trainer.ranks.return_guard import LEAST_SECONDS
from tests.trainer.hanging import a_call_that_never_returns

BEFORE = "the third backward pass begins"


def main() -> None:
    calls, backward = itertools.count(1), Engine.backward

    def hanging(self: Engine, *arguments: Any, **options: Any) -> None:
        if next(calls) == 3:
            print(BEFORE, file=sys.stderr, flush=True)
            a_call_that_never_returns()
        backward(self, *arguments, **options)

    with (
        mock.patch.object(Engine, "backward", hanging),
        mock.patch.object(worker, "least_seconds", return_value=LEAST_SECONDS),
    ):
        worker.main()


if __name__ == "__main__":
    main()
