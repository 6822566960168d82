"""The entries of `lora.targetModules`: names of modules, regular expressions, and `all-linear`.

The trainer selects modules by these entries, and `finetune validate` checks that the regular expressions compile.
"""

from __future__ import annotations

import re
from typing import Any, Final

from finetune_core.patterns import compile_pattern

ALL_LINEAR: Final = "all-linear"
"""The entry that stands for all linear layers, as in peft."""
FIELD: Final = "lora.targetModules"
_NAME = re.compile(r"[A-Za-z0-9_.]+")


def is_pattern(entry: str) -> bool:
    """Return whether ``entry`` is a regular expression, which means that it has a character that no name of a module
    has. A name consists of letters, digits, underscores and dots."""
    return entry != ALL_LINEAR and _NAME.fullmatch(entry) is None


def compile_entry(entry: str) -> Any:
    """Return the compiled regular expression ``entry``. The trainer calls the `fullmatch` of the returned object with
    the full name of each module. Raises UserError where RE2 can't read ``entry``."""
    return compile_pattern(entry, FIELD)
