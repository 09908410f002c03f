"""The user's cache folder: private, owned by the user, and holding nothing but JSON.

Another user who could write here could steer what kpt measures or applies, so a folder that is a
symbolic link, belongs to somebody else or is writable by others is refused, not repaired.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import tempfile
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "KPT_CACHE_DIR"
SIZE_LIMIT = 16 * 2**20
_ANOTHER = f"export {FOLDER_VARIABLE}=<a folder of your own>"


class CacheError(Exception):
    """The cache cannot be trusted or used. ``mend`` is a command that helps."""

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(f"{message} To mend it: {mend}" if mend else message)
        self.message = message
        self.mend = mend


def root() -> Path:
    """Where the cache is; ``KPT_CACHE_DIR`` moves it."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("kpt", appauthor=False))


def folder(name: str) -> Path:
    """The private folder ``name`` inside the cache, made with mode 0700 when it is missing.

    Raises `CacheError` where it cannot be made or cannot be trusted.
    """
    top = root()
    inner = top / name
    for path in (top, inner):
        try:
            path.mkdir(mode=0o700, parents=path is top, exist_ok=True)
        except OSError as error:
            raise CacheError(f"The cache folder {path} cannot be made: {error}.", _ANOTHER) from error
        check(path)
    return inner


def check_place() -> None:
    """Raise `CacheError` where the cache folder is not there and cannot be made either."""
    top = root().absolute()
    try:
        above = next(path for path in (top, *top.parents) if path.exists())
    except PermissionError as error:
        raise CacheError(f"The cache folder {root()} cannot be made: {error}.", _ANOTHER) from error
    if above != top and not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        what = "not writable" if above.is_dir() else "not a folder"
        raise CacheError(f"The cache folder {root()} cannot be made: {above} is {what}.", _ANOTHER)


def check(path: Path) -> None:
    """Raise `CacheError` unless ``path`` is a folder of this user that nobody else can write to."""
    try:
        facts = path.lstat()
    except OSError as error:
        raise CacheError(f"The cache folder {path} cannot be read: {error}.") from error
    if stat.S_ISLNK(facts.st_mode):
        raise CacheError(f"The cache folder {path} is a symbolic link.", f"rm {shlex.quote(str(path))}")
    if not stat.S_ISDIR(facts.st_mode):
        raise CacheError(f"The cache folder {path} is not a folder.", f"rm {shlex.quote(str(path))}")
    if facts.st_uid != os.geteuid():
        raise CacheError(f"The cache folder {path} belongs to another user (uid {facts.st_uid}).", _ANOTHER)
    if facts.st_mode & 0o022:
        raise CacheError(
            f"The cache folder {path} can be written to by others.", f"rm -r {shlex.quote(str(path))}"
        )
    if facts.st_mode & 0o077:
        path.chmod(0o700)


def read_json(path: Path) -> Any:
    """The JSON value in ``path``; None when there is no such file.

    Raises `CacheError` for a link, a foreign owner, an absurd size, or text that is not JSON.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"The cache file {path} cannot be opened: {error}.", _remove(path)) from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            raise CacheError(f"The cache file {path} is not a private file of this user.", _remove(path))
        if facts.st_size > SIZE_LIMIT:
            raise CacheError(f"The cache file {path} has {facts.st_size} bytes.", _remove(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read()
    finally:
        os.close(descriptor)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"The cache file {path} is not JSON: {error}.", _remove(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` in one step, readable by this user alone."""
    text = json.dumps(value, indent=1, sort_keys=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove(path: Path) -> str:
    return f"rm -r {shlex.quote(str(path))}"
