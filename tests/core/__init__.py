"""Tests of the package finetune_core: models, CRD, API reference, contract, planning and validation."""
