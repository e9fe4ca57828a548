"""The examples are configurations that the jobs accept, and README and pages name files that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import JOBS, JobKind

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: path.stem)
def test_an_example_is_a_job_of_the_kind_that_its_name_says(path: Path) -> None:
    config = JOBS[JobKind(path.stem)].from_toml(path)
    paths = [source.model for source in getattr(config, "experts", {}).values()]
    assert all(Path(path.parent, model).resolve().parts[-4:-1] == ("models", "lab", "experts") for model in paths)
    assert getattr(config, "name", "") == "lab"
