"""Whatever a caller sends to the trainer: no blame on the service, no hang, and the next caller is served as before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusionroute.errors import InvalidRequest
from fusionroute.grpc_runtime import channel
from tests.fake_job import config_of
from tests.fuzz.configurations import LABEL, fuzz_configurations
from tests.fuzz.fuzzing import Tally, fuzz
from tests.fuzz.health import is_serving
from tests.fuzz.trainer_target import SERVICE, served_trainer
from trainer.config import SftJob

SHORT_COUNT = 250
SHORT_CONFIGURATIONS = 80


async def test_malformed_requests_to_a_trainer_hurt_nobody_but_their_caller(tmp_path: Path) -> None:
    async with served_trainer(tmp_path / "published") as trainer, channel(trainer.address) as open_channel:
        before = await trainer.answer()
        tally = await fuzz(open_channel, SERVICE, trainer.valid_requests(), SHORT_COUNT)
        assert await is_serving(open_channel)
        assert await trainer.answer() == before
    assert not tally.faults, tally.faults
    assert not tally.num_hanging
    assert len(tally.statuses) > 6


async def test_impossible_configurations_are_refused_as_their_senders_mistake(tmp_path: Path) -> None:
    tally = Tally()
    async with served_trainer(tmp_path / "published") as trainer, channel(trainer.address) as open_channel:
        before = await trainer.answer()
        await fuzz_configurations(open_channel, config_of(), SHORT_CONFIGURATIONS, 0, tally)
        assert await trainer.answer() == before
    assert not tally.faults, tally.faults
    assert not tally.num_hanging
    assert tally.statuses[LABEL, "INVALID_ARGUMENT"] > SHORT_CONFIGURATIONS / 4
    assert {status for _, status in tally.statuses} <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}, tally.statuses


@pytest.mark.parametrize(
    ("table", "field", "text", "named"),
    [
        ("data", "split", "\ud800", r"data.split = '\ud800'"),
        ("data", "files", ["good", "a\ud800"], r"data.files.1 = 'a\ud800'"),
        ("labels", "folder", "a\0b", r"labels.folder = 'a\x00b'"),
    ],
)
def test_text_that_cannot_be_stored_is_refused_by_name(
    table: str, field: str, text: object, named: str
) -> None:
    content = json.loads(config_of())
    content[table][field] = text
    with pytest.raises(InvalidRequest) as caught:
        SftJob.from_json(json.dumps(content))
    assert named in caught.value.message
    caught.value.message.encode()
