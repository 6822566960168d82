"""End-to-end tests: real FineTuneJobs on a test cluster, from `kubectl apply` to the checkpoints and artifacts in the
bucket."""
