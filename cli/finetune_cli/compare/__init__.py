"""`finetune compare`: compares runs by what they wrote into their folders: scores, curves, speed, memory, cost,
settings, and the claims of the study that this project began with.

`command.py` is the entry. `folders.py` reads folders, and all other modules are pure: `stored_files.py` parses what a
folder holds, `training_history.py` finds the steps that count, `compared_run.py` puts one run together, `intervals.py`
has the statistics, `figures.py` the figures, `settings.py` the differing settings, `claims/` the claims, `table.py` the
view of the terminal, and `page.py` with `plots.py` the HTML file. Code that only one of the other commands needs does
not belong here."""
