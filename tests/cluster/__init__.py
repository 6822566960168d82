"""A real Kubernetes cluster on one machine, without a container engine.

``Cluster`` starts it, ``python -m tests.cluster`` is the same on the command line, ``fixtures`` hands one to pytest; README.md tells how it works.
"""
