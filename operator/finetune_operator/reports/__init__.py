"""The HTTPS server that receives progress reports from the training pods, and what it needs: TLS certificates, token
review, and the EndpointSlice that points at the leader.

`status/` merges reports into the status of a job. `finetune_core.contract` defines the format of reports.
"""
