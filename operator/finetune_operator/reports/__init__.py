"""The HTTPS server that receives progress reports from the training pods, and what it needs: TLS certificates, token
review, and the EndpointSlice that points at the leader.

What a report means for the status belongs into `status/`; the format of reports into `finetune_core.contract`.
"""
