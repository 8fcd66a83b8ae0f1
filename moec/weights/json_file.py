"""Strict reading of JSON that somebody else wrote: bounded size, no duplicate keys, no NaN, no runaway nesting."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import NoReturn

from moec.errors import UnsafeInputError, UsageError

MAXIMUM_JSON_BYTES = 100_000_000


def open_regular_file(path: Path) -> int:
    """Descriptor of `path` for reading. Symbolic links at the last component and anything but a file are refused.

    Raises UsageError when there is no such file or it may not be read, UnsafeInputError for links, pipes, devices.
    """
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to must not hang before it can be refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise UsageError("the file does not exist", where=str(path), hint="check the path") from None
    except OSError as error:
        if path.is_symlink():
            raise UnsafeInputError(
                "the file is a symbolic link", where=str(path), hint="put the file itself there"
            ) from None
        raise UsageError(
            f"the file cannot be opened: {error.strerror}", where=str(path), hint="check its permissions"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeInputError("this is not a regular file", where=str(path), hint="put a regular file there")
    return descriptor


def parse_json_object(data: bytes, where: str) -> dict[str, object]:
    """Parse the UTF-8 bytes of one JSON object. Raises UnsafeInputError for all that is not plain, unambiguous JSON."""

    def refuse(problem: str) -> NoReturn:
        raise UnsafeInputError(problem, where=where, hint="download the file again or repair it")

    def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    refuse(f"the JSON key {key!r} occurs twice in one object")
                seen.add(key)
        return result

    def no_constant(text: str) -> object:
        refuse(f"{text} is not JSON")

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"the JSON text is not UTF-8 (byte {error.start})")
    try:
        value = json.loads(text, object_pairs_hook=unique_keys, parse_constant=no_constant)
    except RecursionError:
        refuse("the JSON text is nested too deeply")
    except ValueError as error:
        refuse(f"the JSON text cannot be parsed ({error})")
    if not isinstance(value, dict):
        refuse(f"the JSON text must be an object, not a {type(value).__name__}")
    return value


def read_json_object(path: Path, *, follow_link_to: Path | None = None) -> dict[str, object]:
    """Read a JSON file that holds one object, at most 100 MB.

    `follow_link_to` is the already checked target when `path` itself is a permitted link.
    Raises UsageError when it is missing, UnsafeInputError when it is malformed.
    """
    descriptor = open_regular_file(follow_link_to or path)
    with os.fdopen(descriptor, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAXIMUM_JSON_BYTES:
            raise UnsafeInputError(
                f"the file has {size} bytes, more than the {MAXIMUM_JSON_BYTES} allowed for JSON",
                where=str(path),
                hint="check that this is the right file",
            )
        return parse_json_object(stream.read(MAXIMUM_JSON_BYTES + 1), str(path))
