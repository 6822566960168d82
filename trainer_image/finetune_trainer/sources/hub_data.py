"""Brings a split of a data set on the Hugging Face Hub to this machine: the split's own files, at one commit.

Which files make up a split is read as the hub's own viewer reads it: from `configs` in the front matter of the data
card where there are any, else from the names of the files. No code of the repository is run.
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
from finetune_trainer.sources.hub import ask_hub

CARD = "README.md"
PARALLEL_DOWNLOADS = 4


def fetch_split(source: HuggingFaceDataSource, name: str, token: str | None, folder: Path) -> Path:
    """Download the files of a split into ``folder`` and return it; ``name`` is the field path of the data source.

    Raises UserError for a split or subset that is not there, OutsideFailure where the hub refuses.
    """
    _fetch(source, name, token, folder, lambda files, sizes: files)
    return folder


def fetch_first_file(
    source: HuggingFaceDataSource, name: str, token: str | None, folder: Path, *, most_bytes: int
) -> tuple[Path, bool] | None:
    """As `fetch_split`, but only the split's first file, and None where that has more than ``most_bytes``.

    Returns the folder, and whether the file is all there is of the split.
    """

    def first(files: list[str], sizes: Mapping[str, int]) -> list[str]:
        return [file for file in files[:1] if sizes[file] <= most_bytes]

    fetched, found = _fetch(source, name, token, folder, first)
    return (folder, fetched == found) if fetched else None


def _fetch(
    source: HuggingFaceDataSource,
    name: str,
    token: str | None,
    folder: Path,
    choose: Callable[[list[str], Mapping[str, int]], list[str]],
) -> tuple[list[str], list[str]]:
    """Download what ``choose`` takes of a split's files (and their sizes); return what was taken, and all of them."""
    from huggingface_hub import HfApi, snapshot_download

    field = f"{name}.huggingFace"

    def download() -> tuple[list[str], list[str]]:
        api = HfApi(token=token or False)
        info = api.dataset_info(source.repo, revision=source.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        commit, files = info.sha, list(sizes)
        card = ""
        if CARD in files:
            path = api.hf_hub_download(
                source.repo, CARD, repo_type="dataset", revision=commit, local_dir=folder.with_suffix(".card")
            )
            card = Path(path).read_text()
        found = split_files(files, card_configs(card), subset=source.subset, split=source.split, field=field)
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

    return ask_hub(download, field=field, repo=source.repo, revision=source.revision, has_token=token is not None)


def _literal(file: str) -> str:
    """Return the pattern that matches ``file`` alone."""
    return re.sub(r"([*?\[])", r"[\1]", file)


def card_configs(card: str) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Return the patterns of files by subset and split that a data card names; empty where it names none."""
    import yaml

    matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        fields = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return {}
    found: dict[str, dict[str, list[str]]] = {}
    for config in (fields.get("configs") or []) if isinstance(fields, dict) else []:
        files = config.get("data_files") if isinstance(config, dict) else None
        # One pattern or a list of them is the split `train`; else each item names its split.
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
    """Return the data files of a split; raises UserError that says what there is instead."""
    if configs:
        return _by_card(files, configs, subset=subset, split=split, field=field)
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
    return _of_one_kind(sorted(found), field)


def _names_split(file: str, split: str) -> bool:
    """Whether the name of a file, or of its folder, has the split's name as a word: `main/train-00000-of-1.parquet`."""
    parts = PurePosixPath(file).parts[-2:]
    return any(re.search(rf"(^|[-._ 0-9]){re.escape(split)}($|[-._ 0-9])", part) for part in parts)


def _by_card(
    files: Sequence[str],
    configs: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    subset: str | None,
    split: str,
    field: str,
) -> list[str]:
    if subset is None and len(configs) > 1 and "default" not in configs:
        raise UserError(f"{field}.subset", f"must be one of {', '.join(configs)}")
    chosen = subset or ("default" if "default" in configs else next(iter(configs)))
    if chosen not in configs:
        raise UserError(f"{field}.subset", f"must be one of {', '.join(configs)}")
    if split not in configs[chosen]:
        raise UserError(f"{field}.split", f"must be one of {', '.join(configs[chosen])}")
    patterns = configs[chosen][split]
    found = sorted({file for file in files for pattern in patterns if fnmatch.fnmatchcase(file, pattern)})
    if not found:
        raise UserError(f"{field}.split", f"the data card names files that are not there: {', '.join(patterns)}")
    return _of_one_kind(found, field)


def _of_one_kind(files: list[str], field: str) -> list[str]:
    """Return the files of the kind that comes first in DATA_SUFFIXES: data sets often hold the same rows twice."""
    for suffix in (".parquet", ".jsonl", ".csv"):
        found = [file for file in files if file.lower().endswith(suffix)]
        if found:
            return found
    raise UserError(f"{field}.split", f"must have {', '.join(DATA_SUFFIXES)} files, not {files[0]}")
