"""Finds where in a parquet file the values of the wanted columns lie. A separate process reads the file.

pyarrow ends the whole process when it is asked for the place of a column whose statistics are damaged. The preflight
check must go on after such a file, so it starts this module as a program of its own. The program reads the path and the
columns from its standard input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "finetune_trainer.sources.parquet_chunks"]
SECONDS = 120.0
"""Longest time in seconds for reading the places of the columns, which takes less than one second on an idle
machine."""


class PlacesUnknownError(Exception):
    """The places of the columns can't be read, although the schema may be readable."""


def first_row_group(path: Path, columns: Collection[str]) -> list[tuple[int, int]]:
    """Return offset and length, in bytes, of each column chunk in the first row group of a parquet file. Only
    ``columns`` count, or all columns if the file has none of them.

    Raises PlacesUnknownError if pyarrow raises an error, ends its process or takes too long.
    """
    request = json.dumps([str(path), *columns]).encode()
    try:
        ended = subprocess.run(COMMAND, input=request, capture_output=True, timeout=SECONDS, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise PlacesUnknownError(str(error)) from error
    return [(offset, length) for offset, length in json.loads(ended.stdout)]


def _places(path: str, columns: Collection[str]) -> Iterator[tuple[int, int]]:
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    if metadata.num_row_groups == 0:
        return
    group = metadata.row_group(0)
    chunks: list[Any] = [group.column(index) for index in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    for chunk in wanted or chunks:
        offset = chunk.data_page_offset
        if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < offset:
            offset = chunk.dictionary_page_offset
        yield max(0, offset), max(0, chunk.total_compressed_size)


if __name__ == "__main__":
    file, *names = json.load(sys.stdin)
    print(json.dumps(list(_places(file, names))))
