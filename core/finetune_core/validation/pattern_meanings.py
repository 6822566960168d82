"""Says in words what the regular expressions of the schema ask for, because few people read a regular expression in a
message.

`tests/core/test_patterns.py` fails where a pattern of the schema has no phrase here, and where a pattern here is not in
the schema.
"""

from __future__ import annotations

from typing import Final, get_args

from finetune_core.api.base import (
    DNS_LABEL_PATTERN,
    HTTP_ADDRESS_PATTERN,
    HTTP_URL_PATTERN,
    JOB_NAME_PATTERN,
    LABEL_VALUE_PATTERN,
    S3_URI_PATTERN,
    WEIGHT_PATTERN,
    WORD_PATTERN,
)
from finetune_core.api.sources import PATH_PATTERN
from finetune_core.api.task import ENTRY_POINT_PATTERN
from finetune_core.api.training import Precision

_ALIKE = "that begins and ends with a letter or a digit"

PATTERN_MEANINGS: Final = {
    WEIGHT_PATTERN: 'a decimal number above 0 in quotes, such as "0.5"',
    r"^[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$": 'a decimal number from 0 on in quotes, such as "0.05" or "1e-4"',
    r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?$": 'a decimal number in quotes, such as "0.8"',
    HTTP_ADDRESS_PATTERN: "an address such as http://minio.storage.svc:9000, without user, password, path or query",
    HTTP_URL_PATTERN: "an address such as https://mlflow.example.com/path, without blanks",
    S3_URI_PATTERN: "an address such as s3://bucket/folder/file.jsonl, without blanks",
    PATH_PATTERN: "a path inside the volume or the repository without a leading slash, such as rows/train.jsonl",
    r"^(/[A-Za-z0-9_][-._A-Za-z0-9]*)+$": "an absolute path such as /data/cache, of a-z, A-Z, 0-9, '-', '_' and '.'",
    r"^[A-Za-z0-9_][-A-Za-z0-9_.]*\.jinja$": "the name of a file such as chat_template.jinja",
    r"^[A-Za-z0-9_][-._A-Za-z0-9]*(/[A-Za-z0-9_][-._A-Za-z0-9]*)?$": "the name of a repository such as openai/gsm8k",
    r"^[-._/A-Za-z0-9]+$": "a branch, a tag or a commit, of a-z, A-Z, 0-9, '-', '_', '.' and '/'",
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$": f"a name of a-z, 0-9, '-' and '.' {_ALIKE}",
    DNS_LABEL_PATTERN: f"a name of a-z, 0-9 and '-' {_ALIKE}",
    JOB_NAME_PATTERN: "a name of a-z, 0-9 and '-' that begins with a letter and does not end with '-'",
    LABEL_VALUE_PATTERN: f"a value of a-z, A-Z, 0-9, '-', '_' and '.' {_ALIKE}",
    ENTRY_POINT_PATTERN: f"a name of a-z, A-Z, 0-9, '-', '_' and '.' {_ALIKE}",
    r"^[a-zA-Z0-9]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$": f"a name of a-z, A-Z, 0-9, '-', '_' and '.' {_ALIKE}",
    r"^[A-Za-z0-9]([-.A-Za-z0-9]*[A-Za-z0-9])?$": f"a name of a-z, A-Z, 0-9, '-' and '.' {_ALIKE}",
    r"^[-._a-zA-Z0-9]+$": "a key such as ca.crt, of a-z, A-Z, 0-9, '-', '_' and '.'",
    r"^[A-Za-z_][A-Za-z0-9_]*$": "a name of a-z, A-Z, 0-9 and '_' that does not begin with a digit",
    r"^[-a-zA-Z0-9]+$": "a name such as us-east-1, of a-z, A-Z, 0-9 and '-'",
    r"^[!-~]+$": "a text of visible ASCII characters without blanks",
    WORD_PATTERN: "a text without blanks and control characters",
    r"^([1-9][0-9]{1,6}m|[1-9][0-9]{0,3}(\.[0-9]{1,3})?|0\.[0-9]{0,2}[1-9]0{0,2})$": (
        'a quantity in quotes such as "500m" or "1.5"'
    ),
    r"^([1-9][0-9]{2,6}(Mi|M)|[1-9][0-9]{0,4}(\.[0-9]{1,3})?(Gi|G)|[1-9][0-9]?(\.[0-9]{1,3})?(Ti|T))$": (
        "a quantity of at least 100M, such as 512Mi or 64Gi"
    ),
    r"^([1-9][0-9]{0,6}(Mi|M)|[1-9][0-9]{0,4}(\.[0-9]{1,3})?(Gi|G)|[1-9][0-9]?(\.[0-9]{1,3})?(Ti|T))$": (
        "a quantity such as 512Mi or 8Gi"
    ),
    r"^([1-9][0-9]{0,3}|[1-9][0-9]{0,6}[KMG]i)$": "an amount of memory in huge pages such as 5120Mi",
    "^(Auto|None)$": "Auto or None",
}
"""For a regular expression of the schema, a phrase that follows "must be" in messages of `finetune validate`."""
FOREIGN_VALUES: Final = {
    (get_args(Precision), "fp16"): "there is no fp16, and fp32 computes on GPUs without bf16",
}
"""For the values of an enum and a value that people expect among them, a phrase that says what to use instead."""
