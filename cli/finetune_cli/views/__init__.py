"""What a terminal, a pipe or a log shows of jobs: tables, the panel, the page of a job, and lines about changes.

Nothing here sends a request. Each view is a pure function from values to text, except for the views that redraw.
"""
