"""Faults between the operator and the real API server, and a node that runs pods without containers.

`proxy` forwards every request and disturbs those that `rules` choose; `operators` runs the operator against it;
`stub_node` does what a kubelet (and a person, a drain, a lost node) does to the pods of PyTorchJobs.
"""
