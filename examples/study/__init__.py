"""Anyscale's study of LoRA and full-parameter fine-tuning (September 2023) in small: `make study`.

`smollm2/` has the jobs that run on two cores, `llama2/` the same jobs for the models of the study. `rows.py` makes the
rows of the three tasks: from published files where they are, else with `made_viggo.py`, `made_gsm8k.py` and
`made_sql.py`. `study_jobs.py` lists the jobs in their order, and `__main__.py` runs them and compares the results.
"""
