"""The check of the trainer on one GPU: `make gpu-check`, or `python -m tests.gpu`.

The check measures speed and memory of the trainer's own engine on models of the shape of Llama-2-7B with random
weights, and compares what CUDA computes with a plain loop. It needs no store, no cluster and no data. `catalogue.py`
lists the sections of the check and the goals. With `--dry` the same sections run with a tiny model on the CPU.

The modules import the product, other libraries and each other, but no other module of the tests. So this folder alone
can be mounted into a pod with the trainer's image (docs/gpu-check.md).
"""
