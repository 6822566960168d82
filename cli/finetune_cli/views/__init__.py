"""What a terminal, a pipe or a log shows of a job: the live panel of `finetune watch` and the lines of its log.

Nothing here sends a request. Each view is a pure function from jobs to text, except for the views that redraw.
"""
