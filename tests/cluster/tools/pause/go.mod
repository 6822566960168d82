// The process that holds a pod's namespaces.
module finetune.dev/tests/cluster/tools/pause

go 1.24.0
