"""What is refused before a model is split: processes that do not match, devices, models whose heads do not divide."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from expert_service.settings import ExpertSettings
from fusionroute.engine.parallel import LaunchedWrongly, check_splittable, place_from
from fusionroute.errors import ModelRejected, Reason
from tests.tiny_models import tiny_model

WORLD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}


def test_a_process_stands_where_torchrun_says() -> None:
    place = place_from(WORLD, 2)
    assert (place.rank, place.size, place.local_rank, place.lead_host) == (1, 2, 1, "10.0.0.1")


@pytest.mark.parametrize(
    ("environment", "said"),
    [({}, "torchrun has not started this process"), (WORLD, "torchrun has started 2 processes")],
)
def test_another_number_of_processes_is_refused_with_the_command_to_start_them(
    environment: dict[str, str], said: str
) -> None:
    with pytest.raises(LaunchedWrongly, match=said) as refused:
        place_from(environment, 4)
    assert "tensor_parallel = 4" in str(refused.value)
    assert "torchrun --nproc-per-node 4" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 24}, "num_attention_heads = 6"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"num_key_value_heads": 4, "intermediate_size": 50}, "intermediate_size = 50"),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused_naming_the_number(changes: Any, said: str) -> None:
    with pytest.raises(ModelRejected, match=said) as refused:
        check_splittable(tiny_model("llama", **changes).config, 4)
    assert refused.value.reason is Reason.MODEL_UNSUPPORTED
    assert "tensor_parallel = 4" in refused.value.message


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3"])
def test_the_known_families_can_be_split(family: str) -> None:
    check_splittable(tiny_model(family).config, 2)


def test_a_family_without_a_plan_is_refused() -> None:
    config = tiny_model("llama").config
    config.base_model_tp_plan = None
    with pytest.raises(ModelRejected, match="no plan for tensor parallelism"):
        check_splittable(config, 2)


def test_each_process_takes_its_own_device() -> None:
    with pytest.raises(ValidationError, match="cuda:1"):
        ExpertSettings.model_validate({"model": "m", "tensor_parallel": 2, "device": "cuda:1"})
    assert (
        ExpertSettings.model_validate({"model": "m", "tensor_parallel": 2, "device": "cuda"}).device == "cuda"
    )
    assert ExpertSettings.model_validate({"model": "m", "device": "cuda:1"}).tensor_parallel == 1
