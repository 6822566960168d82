"""Job files that users can copy, the demo, and the generator of the demo's data.

`quickstart.yaml` and `quickstart-full.yaml` run on a laptop. The jobs in `data/` show forms of rows, and the jobs in
`llama2/` repeat a published study on A100 GPUs.
"""
