"""Tests of the Helm chart, which is rendered with the real helm program. No test here needs a cluster."""
