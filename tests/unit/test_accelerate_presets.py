"""The shipped configurations of `accelerate launch`, read as accelerate reads them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]

FOLDER = Path(__file__).resolve().parents[2] / "presets" / "accelerate"
KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP, "fsdp-nodes": DistributedType.FSDP}


def test_every_preset_is_known_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_preset(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert (config.num_machines > 1) == (name == "fsdp-nodes")
    # the job says how precise, and the module casts by itself
    assert config.mixed_precision == "no"
    if KINDS[name] == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_on_one_machine_processes_meet_over_loopback(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.main_process_ip == "127.0.0.1"
