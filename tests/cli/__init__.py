"""Tests of the command line program `finetune`. The tests of `finetune checkpoints` and `finetune download` use a real
MinIO, and the tests of `finetune follow` use a real cluster.
"""
