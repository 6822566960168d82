"""Downloads one split of a data set from the Hugging Face Hub, at one commit. `inputs.py` calls `fetch_split`; the
preflight checks call `fetch_first_file`.

The files of a split are determined as the hub's own data set viewer does: from `configs` in the front matter of the
data card if there are any, otherwise from the file names. No code of the repository is executed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_core.api.sources import HuggingFaceDataSource
from finetune_core.errors import UserError
from finetune_trainer.data.reader import DATA_SUFFIXES
from finetune_trainer.sources.hub_requests import PARALLEL_DOWNLOADS, call_hub

DATA_CARD = "README.md"
PREFERRED_SUFFIXES = (".parquet", ".jsonl", ".csv")
"""Data formats in the order of preference, for repositories that hold the same rows in several formats."""


def fetch_split(source: HuggingFaceDataSource, field: str, token: str | None, folder: Path) -> Path:
    """Download the files of a split into ``folder`` and return ``folder``. ``field`` is the path of the data source in
    the spec, for example `dataset.train`.

    Raises UserError for a split or subset that does not exist, and OutsideFailure if the hub refuses access.
    """
    _fetch(source, field, token, folder, lambda files, sizes: files)
    return folder


def fetch_first_file(
    source: HuggingFaceDataSource, field: str, token: str | None, folder: Path, *, most_bytes: int
) -> tuple[Path, bool] | None:
    """Download the first file of a split into ``folder``, like `fetch_split`. Return None if the file has more than
    ``most_bytes`` bytes.

    Otherwise return the folder, and whether the file is the only one of the split.
    """

    def first(files: list[str], sizes: Mapping[str, int]) -> list[str]:
        return [file for file in files[:1] if sizes[file] <= most_bytes]

    fetched, found = _fetch(source, field, token, folder, first)
    return (folder, fetched == found) if fetched else None


def _fetch(
    source: HuggingFaceDataSource,
    field: str,
    token: str | None,
    folder: Path,
    choose: Callable[[list[str], Mapping[str, int]], list[str]],
) -> tuple[list[str], list[str]]:
    """Download the files that ``choose`` selects from a split's files and their sizes in bytes. Return the selected
    files and all files of the split."""
    from huggingface_hub import HfApi, snapshot_download

    hub_field = f"{field}.huggingFace"

    def download() -> tuple[list[str], list[str]]:
        api = HfApi(token=token or False)
        info = api.dataset_info(source.repo, revision=source.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        commit, files = info.sha, list(sizes)
        card = ""
        if DATA_CARD in files:
            path = api.hf_hub_download(
                source.repo, DATA_CARD, repo_type="dataset", revision=commit, local_dir=folder.with_suffix(".card")
            )
            card = Path(path).read_text()
        found = split_files(files, card_configs(card), subset=source.subset, split=source.split, field=hub_field)
        wanted = choose(found, sizes)
        if not wanted:
            return [], found
        snapshot_download(
            source.repo,
            repo_type="dataset",
            revision=commit,
            local_dir=folder,
            token=token or False,
            allow_patterns=[_literal(file) for file in wanted],
            max_workers=PARALLEL_DOWNLOADS,
        )
        return wanted, found

    return call_hub(download, field=hub_field, repo=source.repo, revision=source.revision, has_token=token is not None)


def _literal(file: str) -> str:
    """Return a glob pattern that matches only ``file``, by escaping its special characters."""
    return re.sub(r"([*?\[])", r"[\1]", file)


def card_configs(card: str) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Return the file patterns that a data card's front matter names, by subset and split; empty if the card names
    none.

    Example: `{"default": {"train": ["data/train-*.parquet"]}}`.
    """
    import yaml

    matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        fields = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return {}
    found: dict[str, dict[str, list[str]]] = {}
    for config in (fields.get("configs") or []) if isinstance(fields, dict) else []:
        files = config.get("data_files") if isinstance(config, dict) else None
        # `data_files` without split names, as one pattern or a list of patterns, belongs to the split `train`.
        # Otherwise each item of the list names its split.
        items = files if isinstance(files, list) else [files] if files else []
        splits: dict[str, list[str]] = {}
        for item in items:
            paths: Any = item.get("path") if isinstance(item, dict) else item
            split = str(item.get("split", "train")) if isinstance(item, dict) else "train"
            splits.setdefault(split, []).extend(paths if isinstance(paths, list) else [paths])
        if splits:
            found[str(config.get("config_name", "default"))] = splits
    return found


def split_files(
    files: Sequence[str],
    configs: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    subset: str | None,
    split: str,
    field: str,
) -> list[str]:
    """Return the paths of a split's data files in the repository. Raises UserError that names the existing subsets,
    splits or files.

    ``configs`` is the result of `card_configs`, and ``field`` the path in the spec: `dataset.train.huggingFace`.
    """
    if configs:
        patterns = _patterns_of_split(configs, subset, split, field)
        found = sorted({file for file in files for pattern in patterns if fnmatch.fnmatchcase(file, pattern)})
        if not found:
            raise UserError(f"{field}.split", f"the data card names files that are not there: {', '.join(patterns)}")
        return _of_first_format(found, field)
    data = [file for file in files if file.lower().endswith(DATA_SUFFIXES)]
    if not data:
        raise UserError(f"{field}.repo", f"has no {', '.join(DATA_SUFFIXES)} file; other kinds are not read")
    if subset is not None:
        data = [file for file in data if subset in PurePosixPath(file).parts[:-1]]
        if not data:
            raise UserError(f"{field}.subset", f"there is no folder {subset!r} with data files")
    found = [file for file in data if _names_split(file, split)]
    if not found:
        raise UserError(f"{field}.split", f"no data file is called after {split!r}; there are {', '.join(data[:8])}")
    folders = {str(PurePosixPath(file).parent) for file in found}
    if subset is None and len(folders) > 1:
        raise UserError(f"{field}.subset", f"must be set: there are files of the split in {', '.join(sorted(folders))}")
    return _of_first_format(sorted(found), field)


def _names_split(file: str, split: str) -> bool:
    """Return whether the name of a file or of its folder contains the split's name as a word, as
    `main/train-00000-of-1.parquet` does for `train`."""
    parts = PurePosixPath(file).parts[-2:]
    return any(re.search(rf"(^|[-._ 0-9]){re.escape(split)}($|[-._ 0-9])", part) for part in parts)


def _patterns_of_split(
    configs: Mapping[str, Mapping[str, Sequence[str]]], subset: str | None, split: str, field: str
) -> Sequence[str]:
    """Return the file patterns that the data card names for a split. Raises UserError that lists the subsets or splits
    that exist."""
    if subset is None and len(configs) > 1 and "default" not in configs:
        raise UserError(f"{field}.subset", f"must be one of {', '.join(configs)}")
    chosen = subset or ("default" if "default" in configs else next(iter(configs)))
    if chosen not in configs:
        raise UserError(f"{field}.subset", f"must be one of {', '.join(configs)}")
    if split not in configs[chosen]:
        raise UserError(f"{field}.split", f"must be one of {', '.join(configs[chosen])}")
    return configs[chosen][split]


def _of_first_format(files: list[str], field: str) -> list[str]:
    """Return the files of the first format in PREFERRED_SUFFIXES that occurs, because many repositories hold the same
    rows in several formats."""
    for suffix in PREFERRED_SUFFIXES:
        found = [file for file in files if file.lower().endswith(suffix)]
        if found:
            return found
    raise UserError(f"{field}.split", f"must have {', '.join(DATA_SUFFIXES)} files, not {files[0]}")
