"""Tests of the CRD against the real API server of the test cluster.

Most tests compare the pydantic models and `finetune validate` with the API server's answers to generated jobs.
"""
