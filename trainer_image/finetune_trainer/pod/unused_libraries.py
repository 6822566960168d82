"""Keeps a process from importing a library that its job does not need.

`worker.py` and the preflight check call `leave_out_bitsandbytes` before they import peft.
"""

from __future__ import annotations

import sys

from finetune_core.contract import RunConfig


def leave_out_bitsandbytes(config: RunConfig) -> None:
    """Let peft and transformers believe that bitsandbytes is not installed, unless the job quantizes the base model.

    peft imports bitsandbytes where it is installed. The import takes more than a second and 40 MB in every process, and
    writes a line to the log that looks like an error. Where peft is imported already, nothing is changed.
    """
    if (config.lora is None or config.lora.quantization is None) and "peft" not in sys.modules:
        # A module that is None in sys.modules can't be found.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
