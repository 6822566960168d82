"""The time that a training pod may take to end after SIGTERM.

`pod_template.py` sets this time in the pods of attempts. `decide/evidence.py` computes from this time how long after a
resume the pods that a suspension deleted may still be ending.
"""

from __future__ import annotations

from typing import Final

TRAINING_GRACE_SECONDS: Final = 90
"""terminationGracePeriodSeconds of training pods: the time to commit a checkpoint after SIGTERM.

With 90 s a new attempt starts within four minutes after the loss of a node: Kubernetes notices the loss after about
50 s, the pod tolerates the node's taint for 30 s, and the operator gives the pod up 60 s after its grace period.
"""
