"""Tests of the command line program `finetune`. The tests in test_checkpoints.py and test_download.py use a real MinIO.
The tests in test_follow.py, about following a job for `finetune watch`, use a real cluster."""
