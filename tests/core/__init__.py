"""Tests of the package finetune_core: API models, CRD, API reference, contract with the trainer, planning and
validation.
"""
