"""Access to the inputs of a job: base models, adapters and data files in the object store, on the Hugging Face Hub or
on a volume. Code that lists, reads and downloads such files belongs here. Code that interprets the rows of a data file
belongs in `data/`.

The launcher and the preflight checks use this package before any worker starts, so nothing here imports torch.
"""
