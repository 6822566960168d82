"""State that the operator keeps in memory between two reconciles of a job, for example the work queue, the newest
report of each job, and errors that wait for a retry.

All of this state is lost at a restart. What must survive a restart belongs in the status of the FineTuneJob.
"""
