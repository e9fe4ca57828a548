"""Keys: what a file of them may say, how they are compared, and how they are replaced while a server runs."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest
import structlog

from fusionroute.api_keys import MAX_KEYS, ApiKeys, ShownKey, read_keys
from fusionroute.errors import InvalidRequest

SHOP = "kT0m5Qb8-shop-shop-shop-shop"
OPS = "Zr7pW1xx-ops-ops-ops-ops-ops"
NEXT = "Ma3nV9yy-next-next-next-next"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_are_known_by_name_in_plain_and_as_digest(path: Path) -> None:
    path.write_text(f"# who may call\n\nshop:{SHOP}  # the shop\nops:sha256:{digest_of(OPS)}\n{NEXT}\n")
    keys = ApiKeys(path)
    assert keys.name_of(SHOP.encode()) == "shop"
    assert keys.name_of(OPS.encode()) == "ops"
    assert keys.name_of(NEXT.encode()) == "line-5"


@pytest.mark.parametrize(
    "shown", ["", SHOP[:-1], SHOP + "x", SHOP.upper(), f"shop:{SHOP}", digest_of(OPS), "shop"]
)
def test_nothing_but_the_whole_key_is_accepted(path: Path, shown: str) -> None:
    path.write_text(f"shop:{SHOP}\nops:sha256:{digest_of(OPS)}\n")
    assert ApiKeys(path).name_of(shown.encode()) is None


def test_every_key_is_compared_whichever_was_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("".join(f"{name}:{key}\n" for name, key in (("a", SHOP), ("b", OPS), ("c", NEXT))))
    keys = ApiKeys(path)
    compared: list[tuple[int, int]] = []

    def counting(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for shown in (SHOP, OPS, NEXT, "wrong"):
        compared.clear()
        keys.name_of(shown.encode())
        assert compared == [(32, 32)] * 3


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        ("short\n", "line 1"),
        (f"shop:{SHOP}\nops:{OPS} and more\n", "line 2"),
        (f"sh op:{SHOP}\n", "line 1"),
        ("ops:sha256:abc\n", "64 hexadecimal digits"),
        (f"{SHOP}\n" * (MAX_KEYS + 1), f"limit is {MAX_KEYS}"),
    ],
)
def test_a_file_that_is_none_is_named_but_not_quoted(path: Path, content: str, named: str) -> None:
    path.write_text(content)
    with pytest.raises(InvalidRequest) as caught:
        ApiKeys(path, "api_keys_file")
    message = caught.value.message
    assert message.startswith("api_keys_file") and str(path) in message and named in message
    assert SHOP not in message and OPS not in message and "short" not in message


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"api_keys_file = '.*keys' cannot be read: No such file"):
        ApiKeys(path)


def test_a_named_pipe_is_refused_instead_of_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(InvalidRequest, match="not a regular file"):
        ApiKeys(path)


def test_a_change_counts_once_it_has_stood_still_for_a_second(path: Path) -> None:
    clock = Clock()
    path.write_text(f"shop:{SHOP}\n")
    keys = ApiKeys(path, clock=clock)
    path.write_text(f"next:{NEXT}\n")
    assert keys.name_of(NEXT.encode()) is None  # looked at less than a second ago
    clock.seconds = 1.0
    assert keys.name_of(NEXT.encode()) is None  # seen, but it may still be written to
    clock.seconds = 2.0
    assert keys.name_of(NEXT.encode()) == "next"
    assert keys.name_of(SHOP.encode()) is None


def test_a_file_that_is_still_written_to_is_left_alone(path: Path) -> None:
    clock = Clock()
    path.write_text(f"shop:{SHOP}\n")
    keys = ApiKeys(path, clock=clock)
    for second, content in enumerate(("", f"shop:{SHOP[:-3]}", f"shop:{SHOP}\nnext:{NEXT}\n"), start=1):
        path.write_text(content)
        clock.seconds = float(second)
        assert keys.name_of(SHOP.encode()) == "shop"
        assert keys.name_of(SHOP[:-3].encode()) is None
    clock.seconds = 4.0
    assert keys.name_of(NEXT.encode()) == "next"


@pytest.mark.parametrize("broken", ["empty", "unreadable", "gone", "nonsense"])
def test_a_broken_file_keeps_the_old_keys_and_says_so_without_the_keys(path: Path, broken: str) -> None:
    clock = Clock()
    path.write_text(f"shop:{SHOP}\n")
    keys = ApiKeys(path, clock=clock)
    match broken:
        case "empty":
            path.write_text("")
        case "gone":
            path.unlink()
        case "unreadable":
            path.unlink()
            path.mkdir()
        case "nonsense":
            path.write_text(f"{OPS} {OPS}\n")
    with structlog.testing.capture_logs() as logs:
        for second in range(1, 6):
            clock.seconds = float(second)
            assert keys.name_of(SHOP.encode()) == "shop"
    assert [entry["event"] for entry in logs] == ["files_not_taken"]
    assert SHOP not in str(logs) and OPS not in str(logs)
    if broken == "unreadable":
        path.rmdir()
    path.write_text(f"next:{NEXT}\n")
    for second in (7, 9):
        clock.seconds = float(second)
        keys.name_of(b"")
    assert keys.name_of(NEXT.encode()) == "next"


def test_the_shown_key_follows_its_file_and_is_never_printed(path: Path) -> None:
    clock = Clock()
    path.write_text(f"me:{SHOP}\n")
    shown = ShownKey(path, clock=clock)
    assert shown.current() == SHOP
    path.write_text(f"me:{NEXT}\n")
    for second in (1.0, 2.0):
        clock.seconds = second
        shown.current()
    assert shown.current() == NEXT
    assert NEXT not in f"{shown!r}{shown}" and SHOP not in f"{shown!r}"
    assert not any(word in repr(read_keys(path, "x")) for word in (NEXT, digest_of(NEXT)))


def test_a_digest_cannot_be_shown(path: Path) -> None:
    path.write_text(f"ops:sha256:{digest_of(OPS)}\n")
    with pytest.raises(InvalidRequest, match=r"api_key_file .* must be the key itself"):
        ShownKey(path)
    with pytest.raises(InvalidRequest, match="FUSIONROUTE_API_KEY: ") as caught:
        ShownKey("too short", "FUSIONROUTE_API_KEY")
    assert "too short" not in caught.value.message
