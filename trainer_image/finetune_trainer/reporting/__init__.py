"""What people see of a run while it trains: log lines, reports to the operator, and the measurements in both.

Only rank 0 reports. The step log in the bucket belongs in `storage/`.
"""
