"""End to end: real jobs on the real cluster, from `kubectl apply` to what lies in the bucket."""
