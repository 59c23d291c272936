"""The kernel cache on disk: entries named by content, written atomically, checked byte by byte before use.

    <cache folder>/               mode 0700: code that will be executed lives here
        kernels/<digest>/         one entry (first 32 hex digits): source, spec.json, what was built, meta.json
        building/<digest>.<random>/  an entry being written; renamed into kernels/ when complete
        locks/<digest>.lock       held while building or replacing that entry
        tuning/                   winners of autotuning (see .autotune)
        triton/                   Triton's own binaries

``meta.json`` is written last and holds the sha256 of every other file and the fingerprint's ingredients, so a half
written, truncated or altered entry is recognised. An entry whose builder was killed stays in ``building/`` and is
removed by whoever holds its lock next; a lock dies with its process, so no time stamp or process id decides that.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from . import fingerprint, settings
from .announce import announce
from .errors import BuildError, CacheError

_log = logging.getLogger("tilewright.cache")
META = "meta.json"
SPEC = "spec.json"


def short(digest: str) -> str:
    """The entry's folder name: 128 bits of the digest."""
    return digest[:32]


@dataclass(frozen=True)
class EntryState:
    """One entry as :meth:`Store.verify` sees it. ``problem`` is None when every byte is as built."""

    name: str
    kind: str
    target: str
    bytes: int
    problem: str | None

    @property
    def ok(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class CacheStatus:
    """What is in the cache. Bytes are file sizes; ``other_bytes`` is tuning, Triton's binaries and locks."""

    path: str
    exists: bool
    writable: bool
    entries: int
    bytes: int
    by_target: dict[str, int] = field(default_factory=dict)
    by_kind: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0
    unreadable: int = 0
    other_bytes: int = 0


@dataclass(frozen=True)
class Cleared:
    """What :func:`clear` removed; ``kept`` says what it could not remove, and why."""

    path: str
    entries: int
    bytes: int
    kept: list[str] = field(default_factory=list)


class Store:
    """One cache folder. Methods let ``OSError`` through; the functions of the module decide what that means."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kernels = root / "kernels"
        self.building = root / "building"
        self.locks = root / "locks"

    def entry(self, digest: str) -> Path:
        return self.kernels / short(digest)

    def prepare(self) -> None:
        """Make the folders, for this user only. Raises OSError, also when one belongs to or is open to others."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self.kernels, self.building, self.locks):
            folder.mkdir(mode=0o700, exist_ok=True)
            self._require_private(folder)

    def _require_private(self, folder: Path) -> None:
        if not hasattr(os, "getuid"):  # Windows: the profile folder is private by its access list
            return
        info = folder.stat()
        if info.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user, who could put code into it", str(folder))
        if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(errno.EPERM, "other users may write to it (chmod go-w mends that)", str(folder))

    @contextmanager
    def lock(self, name: str, timeout: float) -> Iterator[None]:
        """Hold the file lock of an entry. Raises TimeoutError or OSError."""
        lock = filelock.FileLock(self.locks / f"{name}.lock", timeout=timeout, mode=0o600)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            message = f"another process has been building kernel {name} for {timeout:g} s"
            raise TimeoutError(errno.ETIMEDOUT, message) from error
        try:
            yield
        finally:
            lock.release()

    def problem(self, folder: Path) -> str | None:
        """Why an entry must not be loaded, or None. Reads every byte; looks only at the folder itself."""
        try:
            meta = json.loads((folder / META).read_bytes())
        except FileNotFoundError:
            return f"{META} is missing" if folder.exists() else "no such entry"
        except (OSError, ValueError) as error:
            return f"{META} cannot be read: {error}"
        try:
            parts, files = meta["ingredients"], dict(meta["files"])
            if short(fingerprint.digest(parts)) != folder.name or meta["digest"] != fingerprint.digest(parts):
                return f"{META} does not belong to this entry"
            source = meta["source"]
            if files[source] != parts["text_sha256"]:
                return f"{META} contradicts itself about {source}"
        except (KeyError, TypeError, ValueError) as error:
            return f"{META} lacks a field: {error}"
        try:
            present = {path.name for path in folder.iterdir()} - {META, "__pycache__"}
        except OSError as error:
            return str(error)
        for name in sorted(present ^ set(files)):
            return f"{name} is missing" if name in files else f"{name} does not belong there"
        for name, expected in sorted(files.items()):
            try:
                data = (folder / name).read_bytes()
            except OSError as error:
                return f"{name} cannot be read: {error}"
            if fingerprint.sha256(data) != expected:
                return f"{name} is not what was built"
        return None

    def check(self, digest: str) -> str | None:
        """:meth:`problem` of the entry with that digest. A damaged entry is logged; a missing one is not.

        None means that its source is the text that was fingerprinted: the digest covers the text's hash.
        """
        folder = self.entry(digest)
        if not folder.is_dir():
            return "no such entry"
        problem = self.problem(folder)
        if problem is not None:
            _log.warning("kernel cache entry %s is damaged and will be rebuilt: %s", folder, problem)
        return problem

    def publish(
        self,
        digest: str,
        source_name: str,
        text: str,
        parts: dict[str, Any],
        fill: Callable[[Path], None],
    ) -> Path:
        """Write an entry in ``building/`` and rename it into place, replacing a damaged one. The lock must be held."""
        final = self.entry(digest)
        self.remove_unfinished(short(digest))
        folder = self.building / f"{short(digest)}.{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        try:
            write_file(folder / source_name, text.encode())
            write_file(folder / SPEC, (json.dumps(parts["spec"], sort_keys=True, indent=2) + "\n").encode())
            fill(folder)
            files = {}
            for path in sorted(folder.iterdir()):
                if path.name == "__pycache__":
                    shutil.rmtree(path)
                elif not path.is_file() or path.is_symlink():
                    raise BuildError(f"the build left {path.name}, which is no plain file")
                else:
                    files[path.name] = fingerprint.sha256(path.read_bytes())
                    _sync(path)
            meta = {"digest": digest, "source": source_name, "files": files, "ingredients": parts}
            write_file(folder / META, (json.dumps(meta, sort_keys=True, indent=2) + "\n").encode())
            _sync(folder)
            if final.exists():  # damaged, or the caller would have used it
                final.rename(self.building / f"{short(digest)}.{secrets.token_hex(4)}")
            folder.rename(final)
            _sync(self.kernels)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.remove_unfinished(short(digest))
        return final

    def remove_unfinished(self, name: str) -> None:
        """Remove what killed builders of this entry left. The entry's lock must be held."""
        for folder in self.building.glob(f"{name}.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> int:
        """Remove every unfinished entry that no live process holds the lock of. Returns how many."""
        removed = 0
        for folder in self._folders(self.building):
            name = folder.name.partition(".")[0]
            try:
                with self.lock(name, timeout=0):
                    shutil.rmtree(folder)
                    removed += 1
            except TimeoutError:
                continue  # being built right now
            except OSError as error:
                _log.warning("cannot remove the unfinished cache entry %s: %s", folder, error)
        return removed

    def states(self) -> Iterator[EntryState]:
        """Every entry with what is wrong with it. Reads every byte."""
        for folder in self._folders(self.kernels):
            kind = target = "?"
            problem = self.problem(folder)
            try:
                parts = json.loads((folder / META).read_bytes())["ingredients"]
                kind, target = str(parts["spec"]["kind"]), str(parts["target"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                problem = problem or f"{META} cannot be read: {error}"
            yield EntryState(folder.name, kind, target, size(folder), problem)

    @staticmethod
    def _folders(parent: Path) -> list[Path]:
        try:
            return sorted(path for path in parent.iterdir() if path.is_dir())
        except OSError:  # absent or unreadable: nothing to list; status() reports readability on its own
            return []


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file as a whole: a reader sees the old bytes or the new ones."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_file(part, data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """fsync a file or folder, so that the rename cannot reach the disk before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def size(folder: Path) -> int:
    """Bytes of the files below a folder; files that vanish meanwhile count as nothing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except FileNotFoundError:
                continue
    return total


# The folder of this process alone, for cache folders that cannot be written: user's folder -> ours.
_private: dict[Path, Path] = {}
_private_lock = threading.Lock()
_swept: set[Path] = set()


def stores(root: Path) -> list[Store]:
    """Where entries may be found, in order: the cache folder, then the private one that stands in for it."""
    found = [Store(root)]
    if root in _private:
        found.append(Store(_private[root]))
    return found


def put(
    root: Path,
    digest: str,
    source_name: str,
    text: str,
    parts: dict[str, Any],
    fill: Callable[[Path], None],
) -> Path:
    """The folder of a valid entry, built by ``fill(folder)`` if there is none. One process at a time builds it.

    root: the cache folder. fill: writes what the target builds; the source and spec.json are in the folder already.
    Where ``root`` cannot be written (permissions, read-only or full disk, a hung builder), says so once and builds in
    a private temporary folder. Raises :class:`~.errors.CacheError` when that fails too, and whatever ``fill`` raises.
    """
    if root not in _private:
        try:
            return _put(Store(root), digest, source_name, text, parts, fill)
        except OSError as error:
            abandon(root, _why(error, root))
    try:
        return _put(Store(_private[root]), digest, source_name, text, parts, fill)
    except OSError as error:
        raise CacheError(
            f"neither the kernel cache {root} nor the temporary folder {_private[root]} can be written: {error}: "
            "free some space, or point TILEWRIGHT_CACHE_DIR or TMPDIR at a folder you can write"
        ) from error


def _put(
    store: Store, digest: str, source_name: str, text: str, parts: dict[str, Any], fill: Callable[[Path], None]
) -> Path:
    store.prepare()
    with store.lock(short(digest), settings.get().lock_seconds):
        if store.check(digest) is None:
            return store.entry(digest)  # another process built it while this one waited
        folder = store.publish(digest, source_name, text, parts, fill)
    if store.root not in _swept:
        _swept.add(store.root)
        store.sweep()
    return folder


def abandon(root: Path, reason: str) -> Path:
    """Use a private temporary folder in place of ``root`` from now on in this process, and say so once.

    Raises :class:`~.errors.CacheError` when no temporary folder can be made.
    """
    with _private_lock:
        if root not in _private:
            try:
                folder = Path(tempfile.mkdtemp(prefix="tilewright-"))
            except OSError as error:
                raise CacheError(
                    f"the kernel cache {root} cannot be written ({reason}) and no temporary folder can be made "
                    f"({error}): free some space, or point TILEWRIGHT_CACHE_DIR at a folder you can write"
                ) from error
            atexit.register(_remove_private, folder, os.getpid())
            _private[root] = folder
    announce(
        f"the kernel cache {root} cannot be used: {reason}. Kernels are built in a temporary folder and lost when this "
        "process ends; point TILEWRIGHT_CACHE_DIR at a folder you can write.",
        key=f"cache {root}",
    )
    return _private[root]


def _remove_private(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child must not remove its parent's folder
        shutil.rmtree(folder, ignore_errors=True)


def working_folder(root: Path, name: str) -> Path:
    """``root/name``, made if need be; below the private folder where ``root`` cannot be written, which is announced.

    Raises :class:`~.errors.CacheError` when no folder can be made.
    """
    if root not in _private:
        try:
            Store(root).prepare()
            (root / name).mkdir(mode=0o700, exist_ok=True)
            return root / name
        except OSError as error:
            abandon(root, _why(error, root))
    folder = _private[root] / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CacheError(f"the temporary folder {folder} cannot be made: {error}: point TMPDIR elsewhere") from error
    return folder


def _why(error: OSError, root: Path) -> str:
    return f"{error.strerror or error} ({error.filename or root})"


def status(root: Path | None = None) -> CacheStatus:
    """Counts and bytes of the cache folder (default: the setting's). Never raises for what is in it."""
    root = root or settings.get().cache_dir
    store = Store(root)
    by_target: dict[str, int] = {}
    by_kind: dict[str, int] = {}
    entries = total = unreadable = 0
    for folder in store._folders(store.kernels):
        entries += 1
        total += size(folder)
        try:
            parts = json.loads((folder / META).read_bytes())["ingredients"]
            kind, target = str(parts["spec"]["kind"]), str(parts["target"])
        except (OSError, ValueError, KeyError, TypeError):  # counted; `verify` names the reason
            unreadable += 1
            continue
        by_target[target] = by_target.get(target, 0) + 1
        by_kind[kind] = by_kind.get(kind, 0) + 1
    return CacheStatus(
        path=str(root),
        exists=root.is_dir(),
        writable=why_unwritable(root) is None,
        entries=entries,
        bytes=total,
        by_target=dict(sorted(by_target.items())),
        by_kind=dict(sorted(by_kind.items())),
        unfinished=len(store._folders(store.building)),
        unreadable=unreadable,
        other_bytes=size(root) - total if root.is_dir() else 0,
    )


def why_unwritable(root: Path) -> str | None:
    """The reason the cache folder cannot be written, or None when it can.

    Found by writing a small file there. A folder that does not exist yet is not made: its nearest parent is asked.
    """
    try:
        if not root.exists():
            parent = next(folder for folder in root.parents if folder.exists())
            if not parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
            if not os.access(parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
            return None
        store = Store(root)
        store.prepare()
        with tempfile.NamedTemporaryFile(dir=store.locks, prefix="probe-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return _why(error, root)
    return None


def verify(root: Path | None = None) -> list[EntryState]:
    """Every entry of the cache, each ok or with the reason why it would be rebuilt. Reads every byte."""
    return list(Store(root or settings.get().cache_dir).states())


def clear(root: Path | None = None, *, only_damaged: bool = False) -> Cleared:
    """Remove all entries (or only damaged ones), unfinished ones, tuning results and Triton's binaries.

    Kernels loaded in a running process keep working. An entry that is being built right now is kept and named.
    """
    root = root or settings.get().cache_dir
    store = Store(root)
    entries = removed = 0
    kept: list[str] = []
    for folder in store._folders(store.kernels):
        if only_damaged and store.problem(folder) is None:
            continue
        before = size(folder)
        try:
            with store.lock(folder.name, timeout=0):
                # Renamed first: a reader sees the whole entry or none.
                gone = store.building / f"{folder.name}.{secrets.token_hex(4)}"
                folder.rename(gone)
                shutil.rmtree(gone)
        except OSError as error:  # includes TimeoutError: held by a builder
            kept.append(f"{folder.name}: {error.strerror or error}")
            continue
        entries += 1
        removed += before
    before = size(root) if root.is_dir() else 0
    store.sweep()
    if not only_damaged:
        for name in ("tuning", "triton"):
            shutil.rmtree(root / name, ignore_errors=True)
    removed += max(0, before - (size(root) if root.is_dir() else 0))
    return Cleared(str(root), entries, removed, kept)
