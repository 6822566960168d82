"""Job files that users can copy, the demo, and the data generator of the demo.

`quickstart.yaml` and `quickstart-full.yaml` run on a laptop, and `llama2/` repeats a published study on A100 GPUs.
"""
