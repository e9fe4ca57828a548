"""Keys that callers show: one a line in a file, several at a time, replaced without a restart.

# who may call; a line is KEY, NAME:KEY or NAME:sha256:HEX
shop:kT0m5Qb8...            one that can be shown as it stands
ops:sha256:9f86d081884c...  one that can only be recognised
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fusionroute.errors import InvalidRequest, Reason
from fusionroute.watched_files import WatchedFiles, read_small

MIN_KEY_CHARACTERS = 24
MAX_KEY_CHARACTERS = 512
MAX_KEYS = 256
"""Each call is compared with all of them."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_KEY_RULE = (
    f"{MIN_KEY_CHARACTERS} to {MAX_KEY_CHARACTERS} characters of A-Z a-z 0-9 . _ ~ + / = - are needed; "
    "make one with `openssl rand -hex 32`"
)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is recognised, and as it is shown where the file has it in plain."""

    name: str
    digest: bytes = field(repr=False)
    plain: str | None = field(default=None, repr=False)


class ApiKeys:
    """The keys that are accepted, as a file has them now.

    Args:
        path: of the file.
        field_name: what errors call it.
        clock: monotonic, seconds.

    Raises:
        InvalidRequest: the file cannot be read, a line is not a key, or there is none; never quotes a line.
    """

    def __init__(
        self, path: Path, field_name: str = "api_keys_file", *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = path
        self._files = WatchedFiles([path], lambda: read_keys(path, field_name), clock=clock)

    def name_of(self, shown: bytes) -> str | None:
        """The name of the key that was shown, None when it is not accepted.

        Takes the same time whichever key it is and however much of it is right: digests of equal length are
        compared in constant time, and always with all of them.
        """
        digest = hashlib.sha256(shown).digest()
        name: str | None = None
        for key in self._files.current():
            if hmac.compare_digest(digest, key.digest):
                name = key.name
        return name

    def __repr__(self) -> str:
        return f"ApiKeys({str(self.path)!r})"


class ShownKey:
    """The key that is shown to others: the first line of a file, as it has it now, or a fixed one.

    Raises:
        InvalidRequest: the file cannot be read or its first key is a digest; what is fixed is not a key.
    """

    def __init__(
        self,
        source: Path | str,
        field_name: str = "api_key_file",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files: WatchedFiles[str] | None = None
        self._fixed = ""
        if isinstance(source, Path):
            self._files = WatchedFiles([source], lambda: _first_plain(source, field_name), clock=clock)
        else:
            self._fixed = _plain_key(source.strip(), field_name, "the value")

    def current(self) -> str:
        """The key; never to be printed."""
        return self._files.current() if self._files is not None else self._fixed

    def __repr__(self) -> str:
        return "ShownKey(***)"


def read_keys(path: Path, field_name: str) -> tuple[ApiKey, ...]:
    """The keys in a file. Raises InvalidRequest, naming file and line but not what stands there."""
    try:
        text = read_small(path)
    except OSError as error:
        raise refused(field_name, path, f"cannot be read: {error.strerror}") from None
    keys = tuple(
        _parse(stripped, field_name, f"line {number} of {path}", f"line-{number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if (stripped := line.partition("#")[0].strip())
    )
    if not keys:
        raise refused(field_name, path, "has no key in it")
    if len(keys) > MAX_KEYS:
        raise refused(field_name, path, f"has {len(keys)} keys; the limit is {MAX_KEYS}")
    return keys


def refused(field_name: str, path: Path, why: str) -> InvalidRequest:
    """An INVALID_FIELD error about a file that a field names."""
    return InvalidRequest(
        Reason.INVALID_FIELD, f"{field_name} = '{path}' {why}", metadata={"field": field_name}
    )


def _parse(line: str, field_name: str, where: str, unnamed: str) -> ApiKey:
    name, colon, key = line.partition(":")
    if not colon or name == "sha256":
        name, key = unnamed, line
    if not _NAME.fullmatch(name):
        limit = "a name has 1 to 64 characters of A-Z a-z 0-9 . _ -"
        raise InvalidRequest(
            Reason.INVALID_FIELD, f"{field_name}: {where}: {limit}", metadata={"field": field_name}
        )
    if key.startswith("sha256:"):
        hexadecimal = key.removeprefix("sha256:")
        if not _DIGEST.fullmatch(hexadecimal):
            limit = "64 hexadecimal digits are needed after sha256:"
            raise InvalidRequest(
                Reason.INVALID_FIELD, f"{field_name}: {where}: {limit}", metadata={"field": field_name}
            )
        return ApiKey(name, bytes.fromhex(hexadecimal))
    plain = _plain_key(key, field_name, where)
    return ApiKey(name, hashlib.sha256(plain.encode()).digest(), plain)


def _plain_key(key: str, field_name: str, where: str) -> str:
    if not MIN_KEY_CHARACTERS <= len(key) <= MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
        raise InvalidRequest(
            Reason.INVALID_FIELD,
            f"{field_name}: {where} is not a key: {_KEY_RULE}",
            metadata={"field": field_name, "limit": _KEY_RULE},
        )
    return key


def _first_plain(path: Path, field_name: str) -> str:
    first = read_keys(path, field_name)[0]
    if first.plain is None:
        raise refused(
            field_name, path, "begins with a digest: what is shown to others must be the key itself"
        )
    return first.plain
