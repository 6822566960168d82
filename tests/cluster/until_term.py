"""The script of a stand-in container that runs until SIGTERM, and how a test sees that the script handles SIGTERM."""

from __future__ import annotations

HANDLES_TERM = "handles SIGTERM"
"""What a script prints once it handles SIGTERM. A test waits for this text before it does anything that ends the pod.
Without the text the shell may not have reached its `trap` yet. It then ignores SIGTERM, because it is the first process
of its container, and the pod ends only after its whole grace period of 90 s."""
RUNS = f"trap 'exit 143' TERM; echo {HANDLES_TERM}; while :; do sleep 0.2; done"
"""Script that runs until SIGTERM and then exits with code 143, as a trainer does after committing a checkpoint."""
