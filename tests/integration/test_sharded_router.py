"""FSDP2 over two CPU processes: sharded parameters compute, are saved, come back and are written whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.loop_lessons import sft_run, trained_tensors
from trainer.loop import train_loop
from trainer.run_context import RunContext

TOLERANCE = 2e-5

TRAINING = {"batch_rows": 8, "max_steps": 4, "max_gradient_norm": 1e9}

MEMBER = """
import sys
from pathlib import Path
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from trainer.batches import BatchMaker
from trainer.loop_inputs import LoopInputs
from trainer.process_group import ProcessGroup
from trainer.resume import Resumable, local
from trainer.router_module import RouterModule
from trainer.router_trainer import Steps, learning_rate_share, parameter_groups
from trainer.step_plan import StepPlan
from trainer.trained_router import LoopOutcome, write_trained
from trainer.training_state import StateFolder

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", store=distributed.FileStore(str(folder / "meet"), 2), rank=rank, world_size=2)
group = ProcessGroup()
inputs = LoopInputs.load(folder / "inputs")
table = inputs.config.training.model_copy(update={"batch_rows": 4})
module = RouterModule.load(inputs.router, 2, table)
module.train()
mesh = init_device_mesh("cpu", (2,))
for layer in module.lm.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(module, mesh=mesh)
optimizer = AdamW(parameter_groups(module, table), betas=table.betas)
scheduler = LambdaLR(optimizer, lambda step: learning_rate_share(step, 4, table))
maker = BatchMaker(inputs.sft, None, 2, all_targets=False)
plan = StepPlan(table, maker.sft_lengths, maker.pair_lengths, 0.0, 2)
run = Resumable(module.trainable(), optimizer, scheduler, group)
states = StateFolder(folder / "states")

def learn(first, last):
    for step, batch in enumerate(Steps(plan, maker, rank, first), start=first):
        if step == last:
            return
        parts, counts = module(batch).parts, batch.counts
        weight = inputs.config.sft.expert_weight
        loss = parts[0] / counts.targets + weight * parts[1] / counts.informative
        (2 * loss).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

learn(0, 2)
run.save(states, 2)
learn(2, 4)
wanted = {name: local(value).clone() for name, value in module.trainable().items()}
assert run.restore(states.newest()) == 2
assert any(not torch.equal(local(value), wanted[name]) for name, value in module.trainable().items())
learn(2, 4)
for name, value in module.trainable().items():
    assert torch.equal(local(value), wanted[name]), name
write_trained(folder / "trained", module, group, LoopOutcome({}), lambda: module)
distributed.destroy_process_group()
"""


def plain_run(folder: Path) -> Path:
    return sft_run(folder, TRAINING, dropout=0.0)


def test_sharded_over_two_processes_a_run_gives_the_parameters_of_one(tmp_path):
    one = plain_run(tmp_path / "one")
    train_loop(one, RunContext(one))
    two = plain_run(tmp_path / "two")
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(two), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [member.communicate(timeout=100)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], "\n".join(errors)[-3000:]
    whole = trained_tensors(two)
    for name, value in trained_tensors(one).items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=TOLERANCE)
