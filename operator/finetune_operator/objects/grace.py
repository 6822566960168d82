"""The time that a training pod may take to end after SIGTERM.

`pod_template.py` sets the value in the pods of attempts. The rules of `decide/` compute with the same value.
"""

from __future__ import annotations

from typing import Final

TRAINING_GRACE_SECONDS: Final = 90
"""terminationGracePeriodSeconds of the pods: the time to commit a checkpoint after SIGTERM.

A lost node is noticed after about 50 s, its taint is tolerated for 30 s, and a pod on the node is given up 60 s after
its grace period. With 90 s a new attempt therefore starts within four minutes.
"""
