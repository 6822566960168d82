"""Tests against the real API server of the test cluster. Most of them are tests of the CRD. The tests of
`test_agreement.py` and `test_updates.py` generate jobs and updates, and check that the API server accepts or refuses
each of them as the Python validation does."""
