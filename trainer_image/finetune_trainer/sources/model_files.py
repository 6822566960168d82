"""Access to the files of a base model or an adapter on a volume, in the object store or on the Hugging Face Hub: file
sizes, byte ranges, and download. The launcher downloads whole models. The preflight checks read only the headers of the
weight files, and download the small files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from finetune_core.api.sources import HuggingFaceSource, InitialAdapterSpec, ModelSpec, S3Source, VolumeSource
from finetune_core.errors import UserError
from finetune_core.layout import parse_uri
from finetune_trainer.pod.errors import OutsideFailure
from finetune_trainer.pod.model_file_names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE
from finetune_trainer.pod.settings import Paths
from finetune_trainer.sources.content_digest import ContentDigest, hub_digest, object_digest
from finetune_trainer.sources.file_selection import shown
from finetune_trainer.sources.file_tags import file_tag
from finetune_trainer.sources.hub_requests import (
    PARALLEL_DOWNLOADS,
    call_hub,
    literal_pattern,
    read_hub_range,
    read_token,
)
from finetune_trainer.sources.volumes import VolumeFolder
from finetune_trainer.storage.client import EtagForm, Store

T = TypeVar("T")

MODEL_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Suffixes of the files that transformers reads from a model folder. Weights in pickle formats have other suffixes and
are never downloaded.
"""
WEIGHTS_SUFFIX = ".safetensors"


class ModelFiles(Protocol):
    """Access to the files of a model's folder. Subfolders are left out."""

    field: str
    """Path of the field in the spec that names the folder, for example `model.s3.uri`."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Size in bytes of each file, by file name."""

    def tag(self, name: str) -> str:
        """Return a text that differs where the content of the file ``name`` differs."""

    def digest(self, name: str) -> ContentDigest | None:
        """Return the digest that the source states for the content of the file ``name``, or None if it states none."""

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of a file from offset ``start`` on, or fewer if the file ends before."""

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Put the files called ``names`` into the local folder ``folder``."""


def model_files(source: ModelSpec, paths: Paths, store: Store) -> ModelFiles:
    """Return access to the files of a base model. Raises UserError if the folder has no `config.json`, or if it has
    neither safetensors weights nor an index of weight files."""
    files = files_of(source, "model", paths.hub_token_file, paths, store)
    if CONFIG_FILE not in files.sizes:
        if ADAPTER_CONFIG_FILE in files.sizes:
            raise UserError(files.field, f"there is an adapter ({ADAPTER_CONFIG_FILE}), and it must be a base model")
        raise UserError(
            files.field, f"there is no {CONFIG_FILE}: it must be a folder with a model in transformers' layout"
        )
    # An index may name files in other folders or formats, which `select_model_files` then reports by their names.
    if INDEX_FILE not in files.sizes and not any(name.endswith(WEIGHTS_SUFFIX) for name in files.sizes):
        raise UserError(files.field, "there are no *.safetensors weights; other formats are not read")
    return files


def files_of(
    source: ModelSpec | InitialAdapterSpec, section: str, token_file: Path, paths: Paths, store: Store
) -> ModelFiles:
    """Return access to all files of the folder that ``source`` names. ``section`` is the path of ``source`` in the
    spec, for example `model`. ``token_file`` is where the access token of the hub is mounted, if the job has one."""
    if source.volume is not None:
        return LocalFiles(source.volume, paths, section)
    if source.s3 is not None:
        return StoreFiles(source.s3, store, section)
    if source.hugging_face is not None:
        field = f"{section}.huggingFace.tokenSecretRef"
        token = read_token(token_file, field) if token_file.is_file() else None
        return HubFiles(source.hugging_face, token, section)
    raise UserError(section, "must be one of huggingFace, s3, volume")


class LocalFiles:
    """Access to a model folder on a mounted volume."""

    def __init__(self, source: VolumeSource, paths: Paths, section: str = "model") -> None:
        """List the files of the folder. A path that is not a folder counts as an empty folder. ``section`` is the path
        of the source in the spec.

        Raises UserError if the path does not exist or leads out of the volume. This method, `tag` and `read` raise
        OutsideFailure if the file system refuses to read.
        """
        self.field = f"{section}.volume.path"
        self._path = source.path
        self._volume = VolumeFolder(paths.volumes / source.claim_name, source.claim_name, self.field)
        if not self._volume.reading(source.path, lambda local: local.exists()):
            raise UserError(self.field, f"there is no {source.path!r} in volume {source.claim_name!r}")
        self.folder = self._volume.path(source.path)
        self.sizes: Mapping[str, int] = self._volume.reading(source.path, _file_sizes)

    def tag(self, name: str) -> str:
        """Return the tag of a file's content (see `file_tag`). Of a file of more than 64 MiB only parts are read."""
        self._check_inside(name)
        return self._volume.reading(self._path, lambda folder: file_tag(folder / name))

    def digest(self, name: str) -> ContentDigest | None:
        """Return None, because nobody states which content the files on a volume must have."""
        return None

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of a file from offset ``start`` on, or fewer if the file ends before."""
        self._check_inside(name)

        def read(folder: Path) -> bytes:
            with (folder / name).open("rb") as file:
                file.seek(start)
                return file.read(length)

        return self._volume.reading(self._path, read)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Create symbolic links in ``folder`` to the files on the volume. Nothing is copied, because the files may be
        larger than the scratch space."""
        for name in names:
            self._check_inside(name)
            (folder / name).symlink_to((self.folder / name).resolve())

    def _check_inside(self, name: str) -> None:
        """Raise UserError if the file ``name`` is a link that leads out of the volume. The file could be one of the pod
        itself, such as a token, and some files of a model become files of the artifact."""
        try:
            self._volume.path(f"{self._path}/{name}")
        except UserError:
            raise UserError(self.field, f"{shown(name)} must not be a link that leads out of the volume") from None


def _file_sizes(folder: Path) -> dict[str, int]:
    names = folder.iterdir() if folder.is_dir() else ()
    return {path.name: path.stat().st_size for path in names if path.is_file()}


class StoreFiles:
    """Access to a model folder in the object store."""

    def __init__(self, source: S3Source, store: Store, section: str = "model") -> None:
        """List the folder. ``section`` is the path of the source in the spec. Raises OutsideFailure if the store can't
        be reached."""
        self.field = f"{section}.s3.uri"
        self._location, self._store = parse_uri(source.uri), store
        start = len(self._location.prefix) + 1 if self._location.prefix else 0
        prefix = self._location.key("") + "/" if self._location.prefix else ""
        entries = [(entry.key[start:], entry) for entry in store.list_objects(self._location.bucket, prefix)]
        # A key that can't be the name of a file in the folder, for example one with a slash, is no file of the model.
        self._entries = {name: entry for name, entry in entries if _is_file_name(name)}
        self.sizes: Mapping[str, int] = {name: entry.bytes for name, entry in self._entries.items()}

    def tag(self, name: str) -> str:
        """Return size and ETag of an object."""
        return self._entries[name].tag

    def digest(self, name: str) -> ContentDigest | None:
        """Return the digest that the ETag of an object states, or None if the ETag can't be a digest of the
        content."""
        entry, key = self._entries[name], self._location.key(name)

        def form(in_parts: bool) -> EtagForm | None:
            return self._store.etag_form(self._location.bucket, key, in_parts=in_parts)

        return object_digest(size=entry.bytes, etag=entry.etag, form=form)

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of an object from offset ``start`` on, or fewer if the object ends before."""
        data = self._store.read_range(self._location.bucket, self._location.key(name), start, length)
        return self._require(name, data)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Download the objects called ``names`` into ``folder``, several at a time."""

        def download(name: str) -> None:
            stored = self._store.download(self._location.bucket, self._location.key(name), folder / name)
            self._require(name, stored)

        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            list(pool.map(download, names))

    def _require(self, name: str, found: T | None) -> T:
        if found is None:
            raise UserError(self.field, f"{shown(name)} vanished while it was read")
        return found


class HubFiles:
    """Access to a model repository on the Hugging Face Hub."""

    def __init__(self, source: HuggingFaceSource, token: str | None, section: str = "model") -> None:
        """List the repository. ``section`` is the path of the source in the spec. Raises UserError for an unknown
        revision, and OutsideFailure if the hub can't be read or refuses access."""
        self.field, self._section = f"{section}.huggingFace.repo", section
        self._repo, self._revision, self._token = source.repo, source.revision, token
        self._blobs, self._sha256s, self.sizes = self._call(self._list)

    def tag(self, name: str) -> str:
        """Return the id of a file's content in the repository. The id is the same at every commit at which the file has
        this content."""
        return self._blobs[name]

    def digest(self, name: str) -> ContentDigest | None:
        """Return the sha256 of a file in Git LFS, or the Git id of any other file."""
        return hub_digest(size=self.sizes[name], sha256=self._sha256s[name], blob_id=self._blobs[name])

    def read(self, name: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes of a file from offset ``start`` on, or fewer if the file ends before."""
        read = partial(read_hub_range, self._repo, name, self._revision, self._token, start, length)
        return self._call(read)

    def fetch(self, names: Iterable[str], folder: Path) -> None:
        """Download the files called ``names`` into ``folder``, several at a time. Files that an earlier, interrupted
        call has downloaded completely are not downloaded again. Raises OutsideFailure if a file is not there at the
        end."""
        wanted = list(names)

        def download() -> None:
            from huggingface_hub import snapshot_download

            snapshot_download(
                self._repo,
                revision=self._revision,
                local_dir=folder,
                token=self._token or False,
                allow_patterns=[literal_pattern(name) for name in wanted],
                max_workers=PARALLEL_DOWNLOADS,
            )

        self._call(download)
        missing = next((name for name in wanted if not (folder / name).is_file()), None)
        if missing is not None:
            raise OutsideFailure(f"{self.field}: {missing} was not downloaded by the hub's client")

    def _list(self) -> tuple[Mapping[str, str], Mapping[str, str | None], Mapping[str, int]]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        tree = HfApi().list_repo_tree(self._repo, revision=self._revision, token=self._token or False)
        # The client library passes on what the hub answers, whatever its type.
        files = [entry for entry in tree if isinstance(entry, RepoFile) and _is_file_name(str(entry.path))]
        sha256s = {str(f.path): str(f.lfs.sha256) if f.lfs else None for f in files}
        return {str(f.path): str(f.blob_id) for f in files}, sha256s, {str(f.path): int(f.size) for f in files}

    def _call(self, request: Callable[[], T]) -> T:
        """Run ``request`` to the hub and return its result. `call_hub` turns the hub's errors into UserError and
        OutsideFailure."""
        return call_hub(
            request,
            field=f"{self._section}.huggingFace",
            repo=self._repo,
            revision=self._revision,
            has_token=self._token is not None,
        )


def _is_file_name(name: str) -> bool:
    """Return whether ``name`` can be the name of a file in a folder."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\0"} and len(name.encode(errors="replace")) <= 255
