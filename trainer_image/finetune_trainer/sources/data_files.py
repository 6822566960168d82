"""Access to the data files of a source: which files there are, what identifies their contents, and their download.
`inputs.py`, `identities.py` and the preflight check of the rows call `find_data_files`.

A source is a file, a folder or a glob in the object store, on a volume or on the Hugging Face Hub, or a split of a data
set on the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from finetune_core.api.sources import DataSource, S3Source, VolumeSource
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.data.files.index import DataFile
from finetune_trainer.data.files.kinds import kind_of
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.file_selection import chosen, is_glob, literal_prefix, shown
from finetune_trainer.sources.file_tags import file_tag
from finetune_trainer.sources.hub_datasets import HubDataFiles
from finetune_trainer.sources.hub_requests import PARALLEL_DOWNLOADS, read_token
from finetune_trainer.sources.source_files import DataFiles, HeadLimits, SourceFile, fetch_head_by_ranges
from finetune_trainer.sources.volumes import VolumeFolder
from finetune_trainer.storage.client import Store
from finetune_trainer.storage.run_store import ListedObject

MOST_LISTED = 200_000
"""Largest number of objects or files that are looked at for a folder or a glob."""


def find_data_files(source: DataSource, field: str, paths: Paths, store: Store, folder: Path) -> DataFiles:
    """Return the data files of ``source``. ``field`` is the path of the source in the spec, for example
    `dataset.train`. ``folder`` is a local path, which need not exist: a data card of the Hugging Face Hub is
    downloaded into a folder beside it.

    Raises UserError if the source has no data file, or if its files can't be one source, for example because they are
    of several kinds. Raises OutsideFailure if the files can't be listed.
    """
    if source.volume is not None:
        return VolumeDataFiles(source.volume, field, paths)
    if source.s3 is not None:
        return StoreDataFiles(source.s3, field, store)
    if source.hugging_face is not None:
        token = None
        if source.hugging_face.token_secret_ref is not None:
            token = read_token(paths.hub_data_tokens / field, f"{field}.huggingFace.tokenSecretRef")
        return HubDataFiles(source.hugging_face, field, token, folder)
    raise UserError(field, "must be one of huggingFace, s3, volume")


class StoreDataFiles:
    """The data files of a source in the object store."""

    def __init__(self, source: S3Source, field: str, store: Store) -> None:
        """Look for the object that the address in ``source`` names. If there is no such object, look for the objects in
        the folder with this address, or for the objects that match the address as a glob."""
        self._field, self._store = f"{field}.s3.uri", store
        self._bucket, path = parse_uri(source.uri)
        self._entries: dict[str, ListedObject] = {}
        self.notices: list[str] = []
        self.files = self._single(source.uri, path) or self._several(source.uri, path)

    def _single(self, uri: str, path: str) -> list[SourceFile]:
        if not path or uri.endswith("/"):
            return []
        entry = self._store.stat(self._bucket, path)
        # Some programs store an empty object for a folder. Its name has no suffix of a data file.
        if entry is None or (kind_of(path) is None and entry.bytes == 0):
            return []
        self._entries[path] = entry
        return [SourceFile(path, shown(PurePosixPath(path).name), entry.bytes)]

    def _several(self, uri: str, path: str) -> list[SourceFile]:
        prefix = literal_prefix(path) if is_glob(path) else f"{path}/" if path else ""
        listed = self._store.list_objects(self._bucket, prefix, most=MOST_LISTED + 1)
        if len(listed) > MOST_LISTED:
            raise UserError(self._field, f"more than {MOST_LISTED} objects lie at {uri}: name a folder with fewer")
        if not listed and not is_glob(path):
            raise UserError(self._field, f"there is no object {uri}")
        self._entries = {entry.key: entry for entry in listed}
        keys, self.notices = chosen(list(self._entries), path, self._field, uri)
        return [SourceFile(key, f"s3://{self._bucket}/{shown(key)}", self._entries[key].bytes) for key in keys]

    def tag(self, file: SourceFile) -> str:
        """Return size and ETag of the object."""
        return self._entries[file.path].tag

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> list[DataFile]:
        """Download objects into ``folder``, several at a time. The local names are numbers, because a key may be no
        valid name of a file."""
        local = [self._local(file, folder, number) for number, file in enumerate(files)]

        def download(file: SourceFile, path: Path) -> None:
            if self._store.download(self._bucket, file.path, path) is None:
                raise UserError(self._field, f"{file.name} vanished while it was read")

        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            list(pool.map(download, files, [file.path for file in local]))
        return local

    def fetch_head(self, file: SourceFile, folder: Path, limits: HeadLimits) -> DataFile | None:
        """Download the beginning of an object into ``folder``."""

        def read(start: int, length: int) -> bytes:
            data = self._store.read_range(self._bucket, file.path, start, length)
            if data is None:
                raise UserError(self._field, f"{file.name} vanished while it was read")
            return data

        return fetch_head_by_ranges(file, self._local(file, folder, len(list(folder.iterdir()))), limits, read)

    def _local(self, file: SourceFile, folder: Path, number: int) -> DataFile:
        place = file.name if file.name.startswith("s3://") else ""
        return DataFile(folder / f"{number:06d}", file.name, place)


class VolumeDataFiles:
    """The data files of a source on a volume. They are read where they lie."""

    def __init__(self, source: VolumeSource, field: str, paths: Paths) -> None:
        """Look for the file that the path in ``source`` names. If there is no such file, look for the files in the
        folder with this path, or for the files that match the path as a glob."""
        self._field = f"{field}.volume.path"
        self._volume = VolumeFolder(paths.volumes / source.claim_name, source.claim_name, self._field)
        self.notices: list[str] = []
        path = PurePosixPath(source.path).as_posix()
        if self._volume.is_file(path):
            self.files = [SourceFile(path, shown(PurePosixPath(path).name), self._volume.bytes(path))]
            return
        if self._volume.is_folder(path):
            listed = self._volume.list_files(path, most=MOST_LISTED)
        elif is_glob(path):
            start = literal_prefix(path).rpartition("/")[0] or "."
            exists = self._volume.is_folder(start)
            listed = self._volume.list_files(start, most=MOST_LISTED, glob=path) if exists else []
        else:
            raise UserError(self._field, f"there is no {source.path!r} in volume {source.claim_name!r}")
        where = f"{source.claim_name}/{source.path}"
        keys, self.notices = chosen(listed, "" if path == "." else path, self._field, where)
        self.files = [SourceFile(key, f"{source.claim_name}/{shown(key)}", self._volume.bytes(key)) for key in keys]

    def tag(self, file: SourceFile) -> str:
        """Return the tag of the file's content (see `file_tag`)."""
        return self._volume.reading(file.path, file_tag)

    def fetch(self, files: Sequence[SourceFile], folder: Path) -> list[DataFile]:
        """Return the files with their paths on the mounted volume. Nothing is copied, so ``folder`` is not used."""
        return [
            DataFile(self._volume.path(file.path), file.name, file.name if "/" in file.name else "") for file in files
        ]

    def fetch_head(self, file: SourceFile, folder: Path, limits: HeadLimits) -> DataFile | None:
        """Return the whole file with its path on the mounted volume. Nothing is downloaded, so ``limits`` is not
        used."""
        return self.fetch([file], folder)[0]
