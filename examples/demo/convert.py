"""Converts a GGUF file into a folder with bf16 safetensors and tokenizer files: `python -m examples.demo.convert GGUF
FOLDER`.

`base_model.py` runs this module as a separate process, because only the conversion needs torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer in the file ``gguf`` into ``folder``, which is created."""
    place = {"gguf_file": gguf.name}
    # Without `dequantize` the loaded model stays quantised, and can be neither trained nor saved.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=quantization, dtype=torch.bfloat16, **place
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **place).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
