"""Tests of the CRD against the real API server of the test cluster. Most tests generate jobs, and check that the API
server accepts or refuses each job as the pydantic models and `finetune validate` do."""
