"""Tests of the plan: bytes, FLOPs and hours of a job, compared with measurements."""
