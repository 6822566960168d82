"""Tests of the Helm chart. They render the chart with the real helm program and need no cluster."""
