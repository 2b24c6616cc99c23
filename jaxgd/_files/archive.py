"""Archives: read with suspicion, replaced only by what is complete.

This room owns what a member of an archive has to be, and how a file takes the place of
another.
"""

import contextlib
import errno
import os
import secrets
import zipfile
from itertools import pairwise
from typing import Any


class Unreadable(ValueError):
    """What is wrong with a file, in words."""


def require(condition, what) -> None:
    """An error of the archive unless ``condition``, with ``what`` is wrong."""
    if not condition:
        raise Unreadable(what)


def first_line(error) -> str:
    """An exception in a few words."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text[:100].rstrip(".: ")


@contextlib.contextmanager
def replacing(path):
    """A file to write to that takes the place of ``path`` when it is complete."""
    folder, name = os.path.split(path)
    folder = folder or os.curdir
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "There is no such folder", folder)
    temporary = os.path.join(folder, f".{name[:50]}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The new name too is to survive a power cut, where folders can be flushed.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def members_of(archive, size) -> dict:
    """Members by name, none of which reaches into another or beyond the file."""
    members = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [m.header_offset + 30 + len(m.filename) + m.compress_size for m in members]
    starts = [info.header_offset for info in members]
    bounds = [0, *(x for pair in zip(starts, ends, strict=True) for x in pair), size]
    ordered = all(a <= b for a, b in pairwise(bounds))
    require(ordered, "its members overlap or reach beyond its end")
    found = {info.filename: info for info in members}
    require(len(found) == len(members), "two of its members have one name")
    return found


def content_of(archive, member) -> bytes:
    """The bytes of a member, which are as many as lie in the file."""
    stored = member.compress_type == zipfile.ZIP_STORED
    stored = stored and member.compress_size == member.file_size
    name = member.filename[:50]
    require(stored, f"its member {name!r} is compressed, which save never does")
    return archive.read(member)


def as_object(part, what) -> dict:
    """``part`` of a manifest, which has to be a JSON object."""
    require(type(part) is dict, f"{what} is no JSON object")
    return part


def typed(part: dict, name, kind) -> Any:
    """The value of a name in a manifest, which has to be of just this type."""
    value = part.get(name)
    # bool is an int to isinstance, not here.
    require(type(value) is kind, f"{name!r} in its manifest is no {kind.__name__}")
    return value
