"""The claims of the study that this project began with, and what a comparison of runs says about each of them. Pure.

`findings.py` has the types, `single_runs.py` the claims about runs alone, `pairs.py` those about a LoRA run beside a
run that trained every parameter, and `study.py` the list. Figures are computed outside of this room."""
