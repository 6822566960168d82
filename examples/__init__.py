"""Job files that users can copy, the demo, and the generator of the demo's data.

`quickstart.yaml` and `quickstart-full.yaml` run on a laptop. `cached-model.yaml` keeps a model on a volume,
`continue-adapter.yaml` goes on with the adapter of another job, the jobs in `data/` show forms of rows, and the jobs in
`study/` repeat a published study, on two cores and on A100 GPUs.
"""
