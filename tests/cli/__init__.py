"""Tests of the command line program `finetune`. The tests of `finetune checkpoints` and `finetune download` use a real
MinIO. The tests in test_follow.py, about following a job for `finetune watch`, use a real cluster."""
