"""Tests of the command line `finetune`.

The tests of checkpoints and downloads use a real MinIO, and the tests of `follow` use a real cluster.
"""
