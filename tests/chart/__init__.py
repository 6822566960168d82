"""Tests of the operator's Helm chart. The real helm program renders the chart, and no test needs a cluster."""
