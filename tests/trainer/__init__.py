"""Tests of `finetune_trainer`, mostly against a real MinIO server and with real processes as ranks. Helper modules have
no `test_` prefix; `docs/traps.md` lists which test covers which trap of training.
"""
