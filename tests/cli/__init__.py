"""Tests of the command line `finetune`. Those of checkpoints and downloads use a real MinIO, those of `follow` a real
cluster."""
