"""The regular expressions of users (`dataset.task.pattern`, `lora.targetModules`), in the syntax of RE2.

RE2 searches in time proportional to the length of a text, whatever the pattern. The trainer uses these patterns, and
`finetune validate` compiles them too. The operator does not compile them, because its image has no RE2.
"""

from __future__ import annotations

from typing import Any

from finetune_core.errors import UserError

PATTERN_BYTES = 1 << 20
"""Largest memory in bytes of a compiled regular expression. RE2 refuses a pattern that needs more."""
PATTERN_FIELD = "dataset.task.pattern"


def compile_pattern(text: str, field: str = PATTERN_FIELD) -> Any:
    """Return the compiled pattern ``text``. Raises UserError where RE2 can't read it. ``field`` is the path in the spec
    that the error names."""
    # Only jobs with a pattern need RE2, so it is imported here.
    import re2

    options = re2.Options()
    options.max_mem = PATTERN_BYTES
    options.log_errors = False
    try:
        return re2.compile(text, options)
    except (re2.error, UnicodeEncodeError) as error:
        detail = error.args[0] if error.args else ""
        detail = detail.decode("utf-8", "replace") if isinstance(detail, bytes) else str(detail)
        raise UserError(field, f"must be a regular expression in the syntax of RE2: {detail}") from None
