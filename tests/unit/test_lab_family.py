"""Building a family: whole or not at all, the same bytes every time, by one builder at a time.

The families here have very few weights and steps: they know nothing, but they are built by the real code.
"""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fusionroute.engine.model import weights_fingerprint
from fusionroute.errors import InvalidRequest
from fusionroute.fusion import CombineRule
from fusionroute.lab.tokenizer import EOS_ID, encode
from fusionroute.router_model import load_checkpoint
from fusionroute.vocabulary import load_tokenizer, tokenizer_fingerprint
from trainer.lab_family import (
    EXPERT_SLOTS,
    Family,
    FamilyIsBusy,
    Progress,
    Recipe,
    Stage,
    WorkerFailed,
    build,
    build_all,
    build_variants,
    family_folder,
    is_complete,
)
from trainer.lab_family.policy import SingleModel
from trainer.lab_family.router_stage import MAX_ANSWER_TOKENS
from trainer.lab_family.training import load

MICRO = Recipe(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    base=Stage(4, 4, 1e-3, 2),
    expert=Stage(3, 4, 1e-3, 2),
    num_router_items=12,
    router=Stage(6, 4, 1e-3, 2),
    gates=Stage(5, 16, 1e-2, 2),
    num_pair_prompts=60,
    preferences=Stage(4, 4, 1e-3, 2),
    preference_epochs=1,
)
VARIANTS = (
    "cdpo_expert_pairs",
    "sft_continued",
    "single_all_gold_from_math",
    "single_dpo",
    "merge_dare",
)
REBUILT = ("merge_dare", "cdpo_expert_pairs")
ENDLESS = dataclasses.replace(MICRO, base=Stage(5_000, 8, 1e-3))

pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Outcome:
    """What came of two builders that started at the same time."""

    families: list[Family]
    reports: list[list[Progress]]
    cache: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    cache = tmp_path_factory.mktemp("cache")
    reports: list[list[Progress]] = [[], []]
    families: list[Family] = []

    def run(report: list[Progress]) -> None:
        families.extend(build_all("micro", (5,), VARIANTS, cache, 1, report.append, recipe=MICRO))

    threads = [threading.Thread(target=run, args=(report,)) for report in reports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert len(families) == 2
    return Outcome(families, reports, cache)


def digests(family: Family) -> dict[str, str]:
    """Digest of every file that a model is loaded from, those of variants too."""
    paths = {
        f"{name}/{path.relative_to(folder)}": path
        for name, folder in {"": family.folder, **family.variants}.items()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "facts.json"
    }
    return {name: hashlib.sha256(paths[name].read_bytes()).hexdigest() for name in sorted(paths)}


def test_of_two_builders_at_once_one_trains_and_both_get_the_family(outcome: Outcome) -> None:
    stages = [{progress.stage for progress in report} for report in outcome.reports]
    of_family = {"base", *EXPERT_SLOTS, "router", "gates", "preferences"}
    needed = {"all_gold_labels", "single_from_format"}
    assert sorted(stages, key=len) == [{"waiting"}, of_family | set(VARIANTS) | needed]
    assert outcome.families[0] == outcome.families[1]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The same family once more, elsewhere, beside another one, where killed builds have left their remains."""
    cache = tmp_path_factory.mktemp("littered")
    folder = family_folder(MICRO, "micro", 5, cache)
    (folder / "router").mkdir(parents=True)
    (folder / "router" / "config.json").write_text("{}")
    (folder.parent / f"{folder.name}.partial-abc").mkdir()
    (folder.parent / f"{folder.name}.variants" / "merge_dare-old.partial-abc").mkdir(parents=True)
    other, same = build_all("micro", (6, 5), REBUILT, cache, 2, recipe=MICRO)
    assert (other.facts["seed"], same.facts["seed"]) == (6, 5)
    assert digests(other).keys() == digests(same).keys()
    assert digests(other)["/base/model.safetensors"] != digests(same)["/base/model.safetensors"]
    return same


def test_the_same_seed_gives_the_same_bytes_whatever_is_built_beside(
    outcome: Outcome, rebuilt: Family
) -> None:
    first, second = digests(outcome.families[0]), digests(rebuilt)
    assert {"/router/model.safetensors", "cdpo_expert_pairs/model.safetensors"} <= second.keys()
    assert second == {name: first[name] for name in second}


def test_what_killed_builds_left_is_cleared_away_by_the_next(rebuilt: Family) -> None:
    assert is_complete(rebuilt.folder)
    assert load_checkpoint(rebuilt.router).manifest.slots == EXPERT_SLOTS
    assert not list(rebuilt.folder.parent.rglob("*.partial-*"))


def test_every_model_of_the_family_loads_and_speaks_one_vocabulary(outcome: Outcome) -> None:
    from transformers import AutoModelForCausalLM

    family = outcome.families[0]
    fingerprints = set()
    for folder in (family.base, *family.experts.values(), family.router_sft, family.router):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = load_tokenizer(str(folder))
        assert model.config.vocab_size == len(tokenizer) == 65
        assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
        assert model.config.pad_token_id == tokenizer.pad_token_id
        fingerprints.add(tokenizer_fingerprint(tokenizer))
    assert len(fingerprints) == 1


def test_the_router_checkpoint_serves_every_rule_for_exactly_these_experts(outcome: Outcome) -> None:
    family = outcome.families[0]
    checkpoint = load_checkpoint(family.router)
    assert set(checkpoint.available_rules(has_base=True)) == set(CombineRule)
    assert checkpoint.manifest.combine == "sum"
    assert checkpoint.manifest.slots == EXPERT_SLOTS == tuple(family.experts)
    for expert in checkpoint.manifest.experts:
        assert expert.weights_fingerprint == weights_fingerprint(load(str(family.experts[expert.slot])))


def test_other_users_may_read_a_family_as_far_as_the_umask_lets_them(
    outcome: Outcome, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    ordinary = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert {path.stat().st_mode for path in outcome.families[0].folder.rglob("*")} == ordinary
    assert outcome.families[0].folder.stat().st_mode in ordinary


def test_the_second_router_is_the_first_one_after_cdpo_on_its_own_mistakes(outcome: Outcome) -> None:
    family = outcome.families[0]
    first, second = load_checkpoint(family.router_sft), load_checkpoint(family.router)
    assert first.manifest.lineage["phase"] == "sft" and second.manifest.lineage["phase"] == "cdpo"
    parent = second.manifest.lineage["parent_fingerprint"]
    assert parent == first.fingerprint(weights_fingerprint(load(str(family.router_sft))))
    pairs = gzip.decompress((family.data / "pairs.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(pairs) == second.manifest.lineage["data"]["pairs"]["rows"] / 2 > 0
    assert all(set(json.loads(line)) >= {"prompt", "chosen", "rejected"} for line in pairs)


def test_every_trained_head_has_moved_away_from_zero(outcome: Outcome) -> None:
    heads = load_checkpoint(outcome.families[0].router).heads
    assert all(tensor.abs().max() > 0 for tensor in heads.tensors().values())


def test_progress_counts_every_stage_to_its_end(outcome: Outcome) -> None:
    report = max(outcome.reports, key=len)
    last = {progress.stage: (progress.step, progress.num_steps) for progress in report}
    assert last["base"] == (4, 4)
    assert last["strings"] == (3, 3)
    assert last["gates"] == (5, 5)
    assert last["preferences"] == (4, 4)
    shares = [progress.build_share for progress in report]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_a_complete_family_is_found_again_without_training(outcome: Outcome) -> None:
    report: list[Progress] = []
    found = build("micro", 5, outcome.cache, 2, report.append, recipe=MICRO)
    assert found == dataclasses.replace(outcome.families[0], variants={})
    again = build_variants(found, VARIANTS[:2], 2, report.append)
    assert again.variants == {name: outcome.families[0].variants[name] for name in VARIANTS[:2]}
    assert report == []


def test_single_models_are_plain_folders_that_learnt_from_the_lm_loss_alone(outcome: Outcome) -> None:
    for name in ("single_all_gold_from_math", "single_dpo"):
        folder = outcome.families[0].variants[name]
        assert {path.name for path in folder.iterdir()} == {
            path.name for path in outcome.families[0].base.iterdir()
        }
        assert load_checkpoint(folder.parent / "checkpoint").heads.routing_weight.abs().max() == 0


def test_a_continued_sft_starts_with_the_routing_head_and_takes_as_many_steps_as_cdpo(
    outcome: Outcome,
) -> None:
    family = outcome.families[0]
    first, second = load_checkpoint(family.router_sft), load_checkpoint(family.variants["sft_continued"])
    parent = weights_fingerprint(load(str(family.router_sft)))
    assert second.manifest.lineage["parent_weights_fingerprint"] == parent
    assert second.manifest.switches["routing"] == "kept"
    assert second.manifest.switches["training"]["max_steps"] == family.facts["stages"]["preferences"]["steps"]
    moved = (second.heads.routing_weight - first.heads.routing_weight).norm()
    assert 0 < moved < second.heads.routing_weight.norm()


def test_pairs_of_experts_are_their_own_mistakes_and_as_many_at_most(outcome: Outcome) -> None:
    family = outcome.families[0]
    folder = family.variants["cdpo_expert_pairs"]
    lines = gzip.decompress((folder.parent / "pairs.jsonl.gz").read_bytes()).decode().splitlines()
    assert 0 < len(lines) <= family.facts["stages"]["preferences"]["num_pairs"]
    row = json.loads(lines[0])
    answers = [
        SingleModel(path).answers([encode(row["prompt"])], MAX_ANSWER_TOKENS)[0]
        for path in family.experts.values()
    ]
    assert encode(row["rejected"]) in [[id for id in answer if id != EOS_ID] for answer in answers]
    assert row["rejected"] != row["chosen"]


def test_a_variant_that_is_not_known_is_refused_by_name(outcome: Outcome) -> None:
    with pytest.raises(InvalidRequest, match="variants = 'cdpo' is not allowed: one of cdpo_bias0"):
        build_variants(outcome.families[0], ("cdpo",))


def test_the_cache_variable_says_where(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONROUTE_CACHE_DIR", str(outcome.cache))
    assert build("micro", 5, recipe=MICRO).folder == outcome.families[0].folder


def test_recipe_seed_and_size_have_folders_of_their_own(tmp_path: Path) -> None:
    other = dataclasses.replace(MICRO, num_router_items=13)
    keys = [(MICRO, "micro", 0), (MICRO, "micro", 1), (MICRO, "other", 0), (other, "micro", 0)]
    assert len({family_folder(*key, tmp_path) for key in keys}) == 4


def test_an_unknown_size_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="size = 'huge' is not allowed: demo or full"):
        build("huge")


def test_a_builder_does_not_wait_for_ever(tmp_path: Path) -> None:
    folder = family_folder(MICRO, "micro", 0, tmp_path)
    folder.parent.mkdir(parents=True)
    with Path(f"{folder}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FamilyIsBusy, match="not done after 0 s"):
            build("micro", 0, tmp_path, recipe=MICRO, wait_seconds=0)


def test_a_failed_stage_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    diverging = dataclasses.replace(MICRO, base=Stage(20, 4, 1e30, 1))
    with pytest.raises(WorkerFailed, match=r"(?s)stage base failed.*FloatingPointError: loss is"):
        build("micro", 0, tmp_path, 1, recipe=diverging)
    assert [path.suffix for path in (tmp_path / "lab").iterdir()] == [".lock"]


BUILD_ENDLESSLY = """
import json, sys
from trainer.lab_family import Recipe, build
if __name__ == "__main__":
    recipe = Recipe.from_json(json.loads(sys.argv[2]))
    build("micro", 0, sys.argv[1], 1, lambda progress: print(progress.step, flush=True), recipe=recipe)
"""


def test_a_killed_build_leaves_no_process_and_nothing_that_looks_complete(tmp_path: Path) -> None:
    script = tmp_path / "build_endlessly.py"
    script.write_text(BUILD_ENDLESSLY)
    command = [sys.executable, str(script), str(tmp_path), json.dumps(ENDLESS.to_json())]
    complaints = tmp_path / "stderr"
    with (
        complaints.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=_environment()) as builder,
    ):
        assert builder.stdout is not None
        builder.stdout.readline()
        workers = psutil.Process(builder.pid).children(recursive=True)
        builder.send_signal(signal.SIGKILL)
        builder.wait(10)
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert complaints.read_text() == ""
    folder = family_folder(ENDLESS, "micro", 0, tmp_path)
    assert not is_complete(folder)
    assert list(folder.parent.glob("*.partial-*"))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path.cwd())}
