"""`finetune run`: trains a job on this machine, without a cluster.

The job file becomes the run file that the operator would write, and the trainer starts as it does in a pod, as a
process of this machine. The command line never imports the trainer. `commands/run_command.py` has the options.
"""
