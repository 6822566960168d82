"""The time that a training pod may take to end after SIGTERM.

`pod_template.py` sets this time in the pods of attempts. `decide/evidence.py` computes with the same time.
"""

from __future__ import annotations

from typing import Final

TRAINING_GRACE_SECONDS: Final = 90
"""terminationGracePeriodSeconds of training pods: the time to commit a checkpoint after SIGTERM.

With 90 s a new attempt starts within four minutes after the loss of a node: the loss is noticed after about 50 s, the
node's taint is tolerated for 30 s, and a pod on the node is given up 60 s after its grace period.
"""
