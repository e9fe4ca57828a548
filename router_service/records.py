"""What is stored of each token: sixteen bytes, little-endian.

bytes   field      type
0-3     token_id   u32
4-7     logprob    f32  natural log, fused distribution; 0 for prompt tokens, not a number where it is not known
8-15    origin     u64  lowest byte: a `TokenSource`, its highest bit (7) set where the token is degraded; next byte:
                        place of the expert's slot in the checkpoint; upper six bytes: the epoch of that slot;
                        both 0 where no single expert took part
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt

from fusionroute.errors import InternalFault, Reason

RECORD_DTYPE = np.dtype([("token_id", "<u4"), ("logprob", "<f4"), ("origin", "<u8")])
RECORD_BYTES = RECORD_DTYPE.itemsize
UNKNOWN_LOGPROB = math.nan
"""Of tokens that were chosen from an expert's highest logits alone."""
_ONE_RECORD = Struct("<IfQ")
_EPOCH_MASK = 2**48 - 1
_DEGRADED_BIT = 0x80
_SOURCE_MASK = 0x7F

Records = npt.NDArray[np.void]
"""A vector with RECORD_DTYPE: one row per token, columns by name, for example ``records["token_id"]``."""


class TokenSource(IntEnum):
    """Who wrote a token."""

    PROMPT = 0
    EXPERT = 1
    """An expert took part, with the router's complement or without."""
    ROUTER = 2
    """The router wrote it alone."""
    ENSEMBLE = 3
    """All experts took part."""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One token as it is stored; `logprob` comes back rounded to f32 and `epoch` cut to 48 bits.

    Attributes:
        expert: place of the expert's slot in the checkpoint; 0 where no single one took part.
        epoch: of that slot.
        degraded: the expert that had been picked was not there.
    """

    token_id: int
    logprob: float = 0.0
    source: TokenSource = TokenSource.PROMPT
    expert: int = 0
    epoch: int = 0
    degraded: bool = False


def pack(records: Sequence[TokenRecord]) -> bytes:
    """The stored form of `records`, RECORD_BYTES each."""
    return b"".join(pack_one(record) for record in records)


def pack_one(record: TokenRecord) -> bytes:
    """The stored form of one record; a fraction of numpy's time, which counts once per token."""
    source = record.source | _DEGRADED_BIT if record.degraded else record.source
    origin = (record.epoch & _EPOCH_MASK) << 16 | record.expert << 8 | source
    return _ONE_RECORD.pack(record.token_id, record.logprob, origin)


def pack_prompt(token_ids: Iterable[int] | npt.NDArray[Any]) -> bytes:
    """The stored form of prompt tokens."""
    ids = np.fromiter(token_ids, dtype=np.uint32)
    rows = np.zeros(len(ids), dtype=RECORD_DTYPE)
    rows["token_id"] = ids
    return rows.tobytes()


def unpack(data: bytes) -> Records:
    """The columns of stored records, read-only, sharing `data`'s memory.

    Raises:
        InternalFault: `data` is not a whole number of records.
    """
    if len(data) % RECORD_BYTES:
        message = f"{len(data)} bytes of stored tokens are no multiple of {RECORD_BYTES}"
        raise InternalFault(Reason.INTERNAL, message)
    return np.frombuffer(data, dtype=RECORD_DTYPE)


def to_token_records(records: Records) -> list[TokenRecord]:
    """The rows of `records` as objects."""
    return [
        TokenRecord(
            token_id,
            logprob,
            TokenSource(origin & _SOURCE_MASK),
            origin >> 8 & 0xFF,
            origin >> 16,
            bool(origin & _DEGRADED_BIT),
        )
        for token_id, logprob, origin in records.tolist()
    ]
