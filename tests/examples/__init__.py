"""Tests of the demo in examples/demo and of the generator of its data, as far as they need no cluster."""
