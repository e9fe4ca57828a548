"""What the loop is given, in files; the reference of phase II."""

import numpy as np
import pytest
import torch

from fusionroute.errors import Reason, TrainingFailed
from tests.loop_lessons import cdpo_job, pair_lesson, random_rows, sft_job, sft_lesson
from tests.tiny_models import eager_rows, save_tiny_model
from trainer.config import TrainingTable
from trainer.loop_inputs import LoopInputs, PairLesson, measure_reference
from trainer.router_module import RouterModule
from trainer.rows import PairSet


def test_inputs_come_back_as_they_were_saved(tmp_path):
    inputs = LoopInputs(cdpo_job("some/router"), "some/router", sft_lesson(), pair_lesson())
    inputs.save(tmp_path / "inputs")
    loaded = LoopInputs.load(tmp_path / "inputs")
    assert inputs.sft is not None and loaded.sft is not None
    assert inputs.pairs is not None and loaded.pairs is not None
    assert (loaded.config, loaded.router) == (inputs.config, "some/router")
    assert loaded.sft.rows.digest == inputs.sft.rows.digest
    assert loaded.pairs.pairs.rows.digest == inputs.pairs.pairs.rows.digest
    for mine, theirs in (
        (inputs.sft.labels, loaded.sft.labels),
        (inputs.pairs.labels, loaded.pairs.labels),
    ):
        np.testing.assert_array_equal(mine.gold_logprobs, theirs.gold_logprobs)
        np.testing.assert_array_equal(mine.argmax_ids, theirs.argmax_ids)
    np.testing.assert_array_equal(inputs.pairs.reference_logprobs, loaded.pairs.reference_logprobs)
    np.testing.assert_array_equal(inputs.pairs.phase_one_routes, loaded.pairs.phase_one_routes)
    assert isinstance(loaded.sft.labels.gold_logprobs, np.memmap)


def test_saving_again_replaces_what_was_there(tmp_path):
    LoopInputs(cdpo_job(), "x", sft_lesson(), pair_lesson()).save(tmp_path / "inputs")
    LoopInputs(sft_job(), "y", sft_lesson()).save(tmp_path / "inputs")
    loaded = LoopInputs.load(tmp_path / "inputs")
    assert loaded.router == "y"
    assert loaded.pairs is None


def test_inputs_without_the_last_file_are_refused_by_name(tmp_path):
    LoopInputs(sft_job(), "y", sft_lesson()).save(tmp_path / "inputs")
    (tmp_path / "inputs" / "COMPLETE").unlink()
    with pytest.raises(TrainingFailed, match=r"inputs are not complete") as caught:
        LoopInputs.load(tmp_path / "inputs")
    assert caught.value.reason is Reason.STATE_BROKEN


def test_a_reference_of_other_rows_is_refused():
    lesson = pair_lesson(3)
    with pytest.raises(ValueError, match="6 rows"):
        PairLesson(lesson.pairs, lesson.labels, lesson.reference_logprobs[:-1], lesson.phase_one_routes)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_reference_is_the_sum_of_log_probabilities_under_the_router_alone(tmp_path, family):
    routing = torch.randn(2, 32), torch.randn(2)
    folder = save_tiny_model(tmp_path / "router", family)
    router = RouterModule.load(str(folder), 2, TrainingTable(device="cpu"), routing)
    pairs = PairSet(random_rows(6, seed=3))
    done: list[int] = []
    logprobs, routes = measure_reference(router, pairs, chunk_tokens=5, advance=done.append)
    assert sum(done) == len(pairs.rows)
    expected_routes: list[int] = []
    for index in range(6):
        row = pairs.rows[index]
        logs = torch.log_softmax(eager_rows(router.lm, row.ids.tolist()), dim=1)
        at = np.flatnonzero(row.supervised)
        assert logprobs[index] == pytest.approx(float(logs[at - 1, row.ids[at]].sum()), abs=1e-3)
        hidden = router.lm.model(
            input_ids=torch.from_numpy(row.ids[None].astype(np.int64))
        ).last_hidden_state[0]
        expected_routes += router.routing(hidden)[at - 1].argmax(1).tolist()
    assert routes.tolist() == expected_routes
    assert set(expected_routes) == {0, 1}
    assert [array.dtype.name for array in (logprobs, routes)] == ["float32", "int32"]
    assert router.training
