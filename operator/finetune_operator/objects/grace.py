"""How long a pod may take to end after SIGTERM. `pods.py` writes the value into the pods of attempts; the rules of
`decide/` reckon with the same value."""

from __future__ import annotations

from typing import Final

TRAINING_GRACE_SECONDS: Final = 90
"""Time to commit a checkpoint after SIGTERM.

A lost node shows after about 50 s, its taint is tolerated for 30 s, and a dead pod is waited for until 60 s after its
grace period. With 90 s of grace a new attempt starts within four minutes.
"""
