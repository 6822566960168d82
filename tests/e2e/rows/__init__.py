"""The rows of the operator's verdict table as end-to-end tests with real pods. In each row a scripted trainer, a pod or
a node fails in one way. The row then says what the job's status and events must show, and within how many seconds."""
