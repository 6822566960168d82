"""Fused kernels of a training step: the parts of a transformers or peft model that ATen computes in many passes over
memory are computed in fewer passes, and keep little more than their inputs for the backward pass.

`use_fused_kernels` in `install.py` is the entry. Each kernel computes the values and the gradients of its plain form,
up to rounding; `tests/trainer/test_kernels.py` compares them. Attention over packed examples is in
`model/packed_attention.py`, and the loss of the output head in `loss/`.

The kernels are made of ATen's operators, and of one source in CUDA C that NVRTC compiles. Libraries of kernels such as
Liger would need Triton, which needs a C compiler in the image of the trainer, and have no form for the CPU.
"""
