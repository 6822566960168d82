"""Tests of the demo in examples/demo and of the generator of its data. These tests need no cluster."""
