"""The model before the engine: its structure, its weight files, a copy with added tokens, and LoRA adapters.

All modules work on local files; fetching the files belongs in `sources/`.
"""
