"""Tests of `finetune_trainer`. Many of them use a real MinIO server, or run real processes as ranks. Helper modules
have no `test_` prefix; `docs/traps.md` lists which test covers which trap of training.
"""
