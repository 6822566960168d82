"""The operator of FineTuneJobs."""

__version__ = "0.1.0"
"""Version of the operator: that of the chart, which `finetune_build_info` shows."""
