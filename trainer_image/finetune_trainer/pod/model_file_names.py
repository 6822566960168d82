"""Names of the files in a model's folder, as transformers writes and reads them.

The checks without torch (`sources/`, `preflight/`) and the code that loads and exports models (`model/`,
`checkpoints/`) share these names. transformers has constants for the names, but importing transformers takes seconds,
which PID 1 avoids.
"""

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
"""Weights of a model that has a single weights file."""
INDEX_FILE = "model.safetensors.index.json"
"""Index of a model with several weights files, which maps each tensor to the file that holds it."""
