"""Access to the inputs of a job: base models and data files in the object store, on the Hugging Face Hub or on a
volume. Code that lists, reads and downloads such files belongs here. What the rows of a data file mean belongs into
`data/`.

The launcher and the preflight checks use this room before any worker starts, so nothing here imports torch.
"""
