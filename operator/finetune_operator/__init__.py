"""The operator of FineTuneJobs."""

__version__ = "0.1.0"
"""Version of the operator, equal to the version of the Helm chart. The metric `finetune_build_info` shows it."""
