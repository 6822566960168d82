"""Tests of the demo and of its data generator, as far as they need no cluster."""
