"""The rows of the operator's verdict table (docs/architecture.md) as test cases with real pods.

In each case something happens to a job: for example, a scripted trainer fails, a pod or node is lost, a person gives an
order, or an object appears late. Each case defines what the job's status and events must then show, and within how many
seconds.
"""
