"""The model before DeepSpeed's engine takes it: its structure, its weight files, a copy with added tokens, and LoRA
adapters.

All modules work on local files; fetching the files belongs in `sources/`.
"""
