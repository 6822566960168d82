"""Tests of the job files and the programs in examples/, such as the demo and the generator of its data. These tests
need no cluster."""
