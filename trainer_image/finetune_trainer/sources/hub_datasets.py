"""Downloads one split of a data set from the Hugging Face Hub, at one commit. `inputs.py` calls `fetch_split`, and the
preflight checks call `fetch_first_file`.

As in the hub's own data set viewer, `configs` in the front matter of the data card names the files of a split. Without
`configs`, the file names tell the split. No code of the repository is executed.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from finetune_core.api.sources import HuggingFaceDataSource
from finetune_core.errors import UserError
from finetune_trainer.data.reader import DATA_SUFFIXES
from finetune_trainer.sources.hub_requests import PARALLEL_DOWNLOADS, call_hub

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

DATA_CARD = "README.md"
PREFERRED_SUFFIXES = (".parquet", ".jsonl", ".csv")
"""Suffixes of data formats, the preferred format first. If a repository holds files in several formats, only the files
in the preferred one are read."""


def fetch_split(source: HuggingFaceDataSource, field: str, token: str | None, folder: Path) -> Path:
    """Download the files of a split into ``folder`` and return ``folder``. ``field`` is the path of the data source in
    the spec, for example `dataset.train`.

    Raises UserError if the split or subset does not exist, and OutsideFailure if the hub can't be read or refuses
    access.
    """
    _fetch(source, field, token, folder, lambda files, _: files)
    return folder


def fetch_first_file(
    source: HuggingFaceDataSource, field: str, token: str | None, folder: Path, *, most_bytes: int
) -> tuple[Path, bool] | None:
    """Download only the first file of a split into ``folder``. Return ``folder``, and whether the split has no other
    file.

    If the file has more than ``most_bytes`` bytes, download nothing and return None. Errors are those of `fetch_split`.
    """

    def first(files: list[str], repository: Mapping[str, RepoSibling]) -> list[str]:
        return [file for file in files[:1] if (repository[file].size or 0) <= most_bytes]

    fetched, found, _ = _fetch(source, field, token, folder, first)
    return (folder, fetched == found) if fetched else None


def split_tags(source: HuggingFaceDataSource, field: str, token: str | None, folder: Path) -> Mapping[str, str]:
    """Return the id of the content of each file of a split, by the file's path in the repository. For a file without an
    id, the commit of the whole repository is returned instead. Only the data card is downloaded, beside ``folder``.
    Errors are those of `fetch_split`."""
    tags: dict[str, str] = {}

    def none(files: list[str], repository: Mapping[str, RepoSibling]) -> list[str]:
        tags.update({file: repository[file].blob_id or "" for file in files})
        return []

    commit = _fetch(source, field, token, folder, none)[2]
    return {file: tag or commit for file, tag in tags.items()}


def _fetch(
    source: HuggingFaceDataSource,
    field: str,
    token: str | None,
    folder: Path,
    choose: Callable[[list[str], Mapping[str, RepoSibling]], list[str]],
) -> tuple[list[str], list[str], str]:
    """Download some files of a split. ``choose`` gets the paths of all files of the split and the repository's
    entries by path, and returns the paths to download. Return the paths of the downloaded files and of all files of the
    split, and the commit that they belong to."""
    from huggingface_hub import HfApi, snapshot_download

    hub_field = f"{field}.huggingFace"

    def download() -> tuple[list[str], list[str], str]:
        api = HfApi(token=token or False)
        info = api.dataset_info(source.repo, revision=source.revision, files_metadata=True)
        repository = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        commit, files = info.sha, list(repository)
        card = ""
        if DATA_CARD in files:
            path = api.hf_hub_download(
                source.repo, DATA_CARD, repo_type="dataset", revision=commit, local_dir=folder.with_suffix(".card")
            )
            card = Path(path).read_text(errors="replace")
        found = split_files(files, card_configs(card), subset=source.subset, split=source.split, field=hub_field)
        wanted = choose(found, repository)
        if not wanted:
            return [], found, commit or ""
        snapshot_download(
            source.repo,
            repo_type="dataset",
            revision=commit,
            local_dir=folder,
            token=token or False,
            allow_patterns=[_literal(file) for file in wanted],
            max_workers=PARALLEL_DOWNLOADS,
        )
        return wanted, found, commit or ""

    return call_hub(download, field=hub_field, repo=source.repo, revision=source.revision, has_token=token is not None)


def _literal(file: str) -> str:
    """Return a glob pattern that matches only the path ``file``, with glob's special characters escaped."""
    return re.sub(r"([*?\[])", r"[\1]", file)


def card_configs(card: str) -> Mapping[str, Mapping[str, Sequence[str]]]:
    """Return the file patterns in the front matter of a data card, by subset and split. Empty if the card names no
    files or is malformed.

    Example: `{"default": {"train": ["data/train-*.parquet"]}}`.
    """
    import yaml

    matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        fields = yaml.safe_load(matter[1]) if matter else None
    except (yaml.YAMLError, ValueError, RecursionError):
        # yaml itself raises ValueError for a date that does not exist, and RecursionError for deep nesting.
        return {}
    found: dict[str, dict[str, list[str]]] = {}
    configs = fields.get("configs") if isinstance(fields, dict) else None
    for config in configs if isinstance(configs, list) else []:
        files = config.get("data_files") if isinstance(config, dict) else None
        # If `data_files` names no splits and is a pattern or a list of patterns, its files belong to the split `train`.
        # Otherwise each of its items names a split.
        items = files if isinstance(files, list) else [files] if files else []
        splits: dict[str, list[str]] = {}
        for item in items:
            paths: Any = item.get("path") if isinstance(item, dict) else item
            split = str(item.get("split", "train")) if isinstance(item, dict) else "train"
            splits.setdefault(split, []).extend(map(str, paths if isinstance(paths, list) else [paths]))
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
    """Return the paths of a split's data files in the repository. ``files`` are the paths of all files of the
    repository, and ``configs`` is the result of `card_configs`. ``field`` is the path in the spec:
    `dataset.train.huggingFace`.

    Raises UserError if there are no such files. The message names the subsets, splits or files that exist.
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
    """Return whether the file's name or its folder's name contains the split's name as a word. For example,
    `main/train-00000-of-00001.parquet` belongs to the split `train`."""
    parts = PurePosixPath(file).parts[-2:]
    return any(re.search(rf"(^|[-._ 0-9]){re.escape(split)}($|[-._ 0-9])", part) for part in parts)


def _patterns_of_split(
    configs: Mapping[str, Mapping[str, Sequence[str]]], subset: str | None, split: str, field: str
) -> Sequence[str]:
    """Return the file patterns that the data card names for a split. If the subset or split does not exist, raises
    UserError with the existing ones."""
    if subset is None and len(configs) > 1 and "default" not in configs:
        raise UserError(f"{field}.subset", f"must be one of {', '.join(configs)}")
    chosen = subset or ("default" if "default" in configs else next(iter(configs)))
    if chosen not in configs:
        raise UserError(f"{field}.subset", f"must be one of {', '.join(configs)}")
    if split not in configs[chosen]:
        raise UserError(f"{field}.split", f"must be one of {', '.join(configs[chosen])}")
    return configs[chosen][split]


def _of_first_format(files: list[str], field: str) -> list[str]:
    """Return the files in the preferred one of the formats that occur in ``files`` (see PREFERRED_SUFFIXES). The others
    are left out, because many repositories hold the same rows in several formats."""
    for suffix in PREFERRED_SUFFIXES:
        found = [file for file in files if file.lower().endswith(suffix)]
        if found:
            return found
    raise UserError(f"{field}.split", f"must have {', '.join(DATA_SUFFIXES)} files, not {files[0]}")
