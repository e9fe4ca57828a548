"""Stored token records."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.errors import InternalFault
from router_service.records import (
    RECORD_BYTES,
    RECORD_DTYPE,
    TokenRecord,
    TokenSource,
    pack,
    pack_prompt,
    to_token_records,
    unpack,
)

RECORDS = st.builds(
    TokenRecord,
    token_id=st.integers(0, 2**32 - 1),
    logprob=st.floats(width=32, allow_nan=False),
    source=st.sampled_from(TokenSource),
    expert=st.integers(0, 255),
    epoch=st.integers(0, 2**48 - 1),
    degraded=st.booleans(),
)


@given(records=st.lists(RECORDS))
def test_unpacked_records_equal_the_packed(records):
    assert to_token_records(unpack(pack(records))) == records


@given(records=st.lists(RECORDS, min_size=1))
def test_packing_agrees_with_the_declared_layout(records):
    rows = [
        (r.token_id, r.logprob, r.source + 128 * r.degraded + 256 * r.expert + 65_536 * r.epoch)
        for r in records
    ]
    assert pack(records) == np.array(rows, dtype=RECORD_DTYPE).tobytes()


def test_the_layout_is_sixteen_little_endian_bytes():
    record = TokenRecord(0x01020304, 1.0, TokenSource.EXPERT, expert=5, epoch=0x060708090A0B)
    assert pack([record]) == bytes.fromhex("04030201 0000803f 01 05 0b0a09080706")
    assert RECORD_BYTES == 16


def test_the_highest_bit_of_the_source_marks_a_degraded_token():
    record = TokenRecord(1, 0.0, TokenSource.ROUTER, degraded=True)
    assert pack([record]) == bytes.fromhex("01000000 00000000 82 00 000000000000")
    assert to_token_records(unpack(pack([record]))) == [record]


def test_an_epoch_is_cut_to_forty_eight_bits():
    assert to_token_records(unpack(pack([TokenRecord(1, epoch=2**48 + 2)])))[0].epoch == 2


@pytest.mark.parametrize("ids", [[], [1, 2, 3], np.array([1, 2, 3])])
def test_a_packed_prompt_is_records_without_an_expert(ids):
    assert pack_prompt(ids) == pack([TokenRecord(int(i)) for i in ids])


def test_half_a_record_is_refused():
    with pytest.raises(InternalFault, match="13 bytes"):
        unpack(bytes(13))
