"""Names of the files in a model's folder, as transformers writes and reads them. Most packages of the trainer share
these names, for example `sources/`, `preflight/`, `model/` and `checkpoints/`.

transformers has constants for these names too. The constants of transformers are not used, because importing
transformers takes seconds, and the launcher, which uses `sources/`, does without it.
"""

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
"""File with all weights of a model, if the model has only one weight file."""
GENERATION_CONFIG_FILE = "generation_config.json"
"""File with the settings for generating texts, such as the tokens at which a text ends. A model may lack this file."""
INDEX_FILE = "model.safetensors.index.json"
"""Index of a model with several weight files. The index names, for each tensor, the file that holds the tensor."""
ADAPTER_FILE = "adapter_model.safetensors"
"""File with all weights of a LoRA adapter."""
PICKLED_ADAPTER_FILE = "adapter_model.bin"
"""File with the weights of an adapter in Python's pickle format, which can run any code when it is read."""
ADAPTER_CONFIG_FILE = "adapter_config.json"
"""Configuration of a LoRA adapter. transformers adds the adapter to a model if this file is in the model's folder."""
