"""Tests of the operator with a real API server, injected faults and a stub node that runs pods without containers.

`proxy.py` forwards the operator's requests and injects the faults of `rules.py`. `operators.py` runs the operator as a
process. `stub_node.py` changes the pods of PyTorchJobs as a kubelet, a drain or a lost node does.
"""
