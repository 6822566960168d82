"""Access to the data files of a data set on the Hugging Face Hub, at one commit: the files of a split, or those that a
path names. `data_files.py` calls `HubDataFiles`.

As in the hub's own data set viewer, `configs` in the front matter of the data card names the files of a split. Without
`configs`, a file belongs to a split if its own name or the name of its folder contains the name of the split as a word
(see `_names_split`). No code of the repository is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from finetune_core.api.sources import HuggingFaceDataSource
from finetune_core.errors import UserError
from finetune_trainer.data.files.index import DataFile
from finetune_trainer.data.files.kinds import KINDS_TEXT, Kind, kind_of
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.sources.file_selection import METADATA, below, chosen, matching, select, shown
from finetune_trainer.sources.hub_requests import PARALLEL_DOWNLOADS, call_hub, literal_pattern, read_hub_range
from finetune_trainer.sources.source_files import HeadLimits, SourceFile, fetch_head_by_ranges

T = TypeVar("T")

DATA_CARD = "README.md"
MAIN_BRANCH = "main"
DEFAULT_CONFIG = "default"
SPELLINGS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files and of their folders by which the library `datasets` knows a split. As there, case
matters: `TRAIN.csv` is not named after a split."""
SPLIT_NAMES = tuple(word for words in SPELLINGS.values() for word in words)
"""If no data file of a repository is named after one of these words, all data files belong to the split `train`."""
PREFERRED_KINDS = (Kind.PARQUET, Kind.JSON_LINES, Kind.JSON, Kind.CSV, Kind.TSV, Kind.TEXT)
"""Kinds of data files, the preferred kind first. If the files of a split are of several kinds, only the files of the
first of these kinds that occurs are read."""


class HubDataFiles:
    """The data files of a source on the Hugging Face Hub, at one commit: the files of a split, or those that a path
    names."""

    def __init__(self, source: HuggingFaceDataSource, field: str, token: str | None, folder: Path) -> None:
        """List the files of the repository. If the source names no path, also download the data card beside ``folder``
        and read it. ``field`` is the path of the data source in the spec, for example `dataset.train`.

        Raises UserError if the revision, split, subset or path does not exist, and OutsideFailure if the hub can't be
        read or refuses access.
        """
        self._source, self._token, self._field = source, token, f"{field}.huggingFace"
        self._commit, self._siblings, card = self._call(lambda: self._read_repository(folder.with_suffix(".card")))
        self.notices: list[str] = []
        self.files = [
            SourceFile(path, f"{source.repo}/{shown(path)}", self._siblings[path].bytes) for path in self._choose(card)
        ]

    def tag(self, file: SourceFile) -> str:
        """Return the id of the file's content, or the commit of the repository for a file without an id."""
        return self._siblings[file.path].blob_id or self._commit

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> list[DataFile]:
        """Download files into ``folder``, several at a time."""
        from huggingface_hub import snapshot_download

        def download() -> None:
            snapshot_download(
                self._source.repo,
                repo_type="dataset",
                revision=self._commit,
                local_dir=folder / "repository",
                token=self._token or False,
                allow_patterns=[literal_pattern(file.path) for file in files],
                max_workers=PARALLEL_DOWNLOADS,
            )

        self._call(download)
        local = [DataFile(folder / "repository" / file.path, file.name, file.name) for file in files]
        missing = next((file.name for file in local if not file.path.is_file()), None)
        if missing is not None:
            raise OutsideFailure(f"{self._field}: {missing} was not downloaded by the hub's client")
        return local

    def fetch_head(self, file: SourceFile, folder: Path, limits: HeadLimits) -> DataFile | None:
        """Download the beginning of a file into ``folder``."""
        read_range = partial(read_hub_range, self._source.repo, file.path, self._commit, self._token)

        def read(start: int, length: int) -> bytes:
            # The hub refuses a range of an empty file.
            return self._call(lambda: read_range(start, length, repo_type="dataset")) if file.bytes else b""

        local = DataFile(folder / f"{len(list(folder.iterdir())):06d}", file.name, file.name)
        return fetch_head_by_ranges(file, local, limits, read)

    def _choose(self, card: str) -> Sequence[str]:
        """Return the paths of the data files, in their order."""
        paths, source = list(self._siblings), self._source
        if source.path is None:
            split = source.split or "train"
            return split_files(paths, card_configs(card), subset=source.subset, split=split, field=self._field)
        field, path = f"{self._field}.path", PurePosixPath(source.path).as_posix()
        if path in self._siblings:
            return [path]
        found, self.notices = chosen(paths, "" if path == "." else path, field, f"{source.repo}/{source.path}")
        return found

    def _read_repository(self, cards: Path) -> tuple[str, Mapping[str, _Sibling], str]:
        """Return the commit of the revision, the files by path, and the text of the data card. The text is empty where
        the source names a path, because the card is then not needed, and where there is no card. ``cards`` is the local
        folder for the card."""
        from huggingface_hub import HfApi

        api, source = HfApi(token=self._token or False), self._source
        info = api.dataset_info(source.repo, revision=source.revision or MAIN_BRANCH, files_metadata=True)
        # The client library passes on what the hub answers, whatever its type.
        siblings = {
            str(sibling.rfilename): _Sibling(int(sibling.size or 0), str(sibling.blob_id or ""))
            for sibling in info.siblings or ()
        }
        unsafe = next((path for path in siblings if {"", ".", ".."} & set(path.split("/"))), None)
        if unsafe is not None:
            raise OutsideFailure(f"{self._field}: {source.repo} has the path {unsafe!r}, which leads elsewhere")
        if self._source.path is not None or DATA_CARD not in siblings:
            return str(info.sha or ""), siblings, ""
        path = api.hf_hub_download(source.repo, DATA_CARD, repo_type="dataset", revision=info.sha, local_dir=cards)
        # Many editors on Windows begin a file with a byte order mark, which is not part of the card.
        return str(info.sha or ""), siblings, Path(path).read_text(encoding="utf-8-sig", errors="replace")

    def _call(self, request: Callable[[], T]) -> T:
        return call_hub(
            request,
            field=self._field,
            repo=self._source.repo,
            revision=self._source.revision or MAIN_BRANCH,
            has_token=self._token is not None,
        )


class _Sibling(NamedTuple):
    """A file of a repository: its size, and the id of its content or an empty text."""

    bytes: int
    blob_id: str


class CardConfig(NamedTuple):
    """A configuration (subset) in a data card."""

    is_default: bool
    """Whether the card marks this configuration as the default."""
    patterns: Mapping[str, Sequence[str]] | None
    """The globs of the files of each split, by the name of the split. Empty if the card names only a folder. The files
    of a split are then found by their names (see `_names_split`). None if `data_files` has a form that is not known."""
    folder: str
    """The folder in which the files lie, without a slash at its end. Empty or `.` for the whole repository."""


def card_configs(card: str) -> Mapping[str, CardConfig]:
    """Return the configurations in the front matter of a data card by name. Empty if the card has none, or no front
    matter that can be read."""
    import yaml

    matter = re.match(r"---\s*\n(.*?)\n---\s*(\n|\Z)", card.removeprefix("\ufeff"), re.DOTALL)
    try:
        fields = yaml.safe_load(matter[1]) if matter else None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        # yaml itself raises ValueError for a date that does not exist, RecursionError for deep nesting, and TypeError
        # for a value that can't be the key of a dict.
        return {}
    found: dict[str, CardConfig] = {}
    configs = fields.get("configs") if isinstance(fields, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict):
            continue
        files, folder = config.get("data_files"), config.get("data_dir")
        if files is None and folder is None:
            continue
        name = str(config.get("config_name", DEFAULT_CONFIG))
        patterns = _patterns(files) if files is not None else {}
        place = PurePosixPath(folder).as_posix() if isinstance(folder, str) else ""
        found[name] = CardConfig(config.get("default") is True, patterns, place)
    return found


def _patterns(files: object) -> Mapping[str, Sequence[str]] | None:
    """Return the globs of each split in ``files``, which is `data_files` of a data card. Such a field may be a glob or
    a list of globs, which belong to the split `train`. It may also be a list of items with `split` and `path`, or a
    mapping from splits to globs. Return None for anything else."""
    items = files if isinstance(files, list) else [files]
    if isinstance(files, dict):
        items = [{"split": split, "path": paths} for split, paths in files.items()]
    splits: dict[str, list[str]] = {}
    for item in items:
        split = str(item.get("split", "train")) if isinstance(item, dict) else "train"
        paths = item.get("path") if isinstance(item, dict) else item
        paths = paths if isinstance(paths, list) else [paths]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            return None
        splits.setdefault(split, []).extend(paths)
    return splits


def split_files(
    files: Sequence[str],
    configs: Mapping[str, CardConfig],
    *,
    subset: str | None,
    split: str,
    field: str,
) -> list[str]:
    """Return the paths of a split's data files in the repository. ``files`` are the paths of all files of the
    repository, and ``configs`` is the result of `card_configs`. ``field`` is the path of the source in the spec, for
    example `dataset.train.huggingFace`.

    Raises UserError if there are no such files. The message names the subsets, splits or files that exist.
    """
    if configs:
        config = _chosen(configs, subset, field)
        if config.patterns is None:
            raise UserError(
                field,
                "the data card names the files in a form that is not known: `data_files` must be a glob, a list of"
                " globs, or a list of items with `split` and `path` (huggingFace.path names files without the card)",
            )
        if config.patterns:
            if split not in config.patterns:
                raise UserError(f"{field}.split", f"must be one of {shown(*config.patterns)}")
            start = f"{config.folder}/" if config.folder not in ("", ".") else ""
            patterns = [f"{start}{pattern.removeprefix('./')}" for pattern in config.patterns[split]]
            found = sorted({path for pattern in patterns for path in matching(files, pattern, f"{field}.split")})
            if not found:
                raise UserError(f"{field}.split", f"the data card names files that are not there: {shown(*patterns)}")
            return _of_first_kind(found, field)
        files, subset = below(files, config.folder if config.folder != "." else ""), None
    return _files_by_name(files, subset, split, field)


def _files_by_name(files: Sequence[str], subset: str | None, split: str, field: str) -> list[str]:
    """Return the data files of a split by their names (see `_names_split`). Files with the word ``split`` itself come
    first; only where there are none, files with another of its SPELLINGS are taken. If no data file is named after one
    of SPLIT_NAMES, all data files belong to the split `train`. With ``subset``, only files below a folder of this name
    count."""
    data = [file for file in files if kind_of(file) and PurePosixPath(file).name not in METADATA]
    if not data:
        raise UserError(f"{field}.repo", f"has no data file: the suffix must be {KINDS_TEXT}")
    if subset is not None:
        data = [file for file in data if subset in PurePosixPath(file).parts[:-1]]
        if not data:
            raise UserError(f"{field}.subset", f"there is no folder {subset!r} with data files")
    found = [file for file in data if _names_split(file, split)]
    if not found:
        words = SPELLINGS.get(split, ())
        found = [file for file in data if any(_names_split(file, word) for word in words)]
    if not found and split == "train" and not any(_names_split(file, name) for file in data for name in SPLIT_NAMES):
        found = data
    if not found:
        raise UserError(f"{field}.split", f"no data file is called after {split!r}; there are {shown(*data[:8])}")
    folders = {str(PurePosixPath(file).parent) for file in found}
    if subset is None and len(folders) > 1:
        raise UserError(f"{field}.subset", f"must be set: there are files of the split in {shown(*sorted(folders))}")
    return _of_first_kind(sorted(found), field)


def _names_split(file: str, split: str) -> bool:
    """Return whether the file's name or its folder's name contains the split's name as a word. For example,
    `main/train-00000-of-00001.parquet` belongs to the split `train`."""
    parts = PurePosixPath(file).parts[-2:]
    return any(re.search(rf"(^|[-._ 0-9]){re.escape(split)}(\Z|[-._ 0-9])", part) for part in parts)


def _chosen(configs: Mapping[str, CardConfig], subset: str | None, field: str) -> CardConfig:
    """Return the configuration that ``subset`` names. Without ``subset``, return the configuration that the card marks
    as the default, else the one called `default`, else the only one. Raises UserError, which names the existing
    configurations, if there is no such configuration."""
    marked = next((name for name, config in configs.items() if config.is_default), None)
    default = marked or (DEFAULT_CONFIG if DEFAULT_CONFIG in configs else None)
    chosen = subset or default or (next(iter(configs)) if len(configs) == 1 else None)
    if chosen is None or chosen not in configs:
        raise UserError(f"{field}.subset", f"must be one of {shown(*configs)}")
    return configs[chosen]


def _of_first_kind(files: list[str], field: str) -> list[str]:
    """Return those of ``files`` that are of one kind: the first kind of PREFERRED_KINDS that occurs. The others are
    left out, because many repositories hold the same rows in files of several kinds."""
    for kind in PREFERRED_KINDS:
        found = [file for file in files if (known := kind_of(file)) is not None and known.kind is kind]
        if found:
            return select(found, f"{field}.split", "the split").paths
    raise UserError(f"{field}.split", f"must have data files with the suffix {KINDS_TEXT}, not {shown(files[0])}")
