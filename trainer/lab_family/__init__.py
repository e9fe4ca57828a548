"""The lab's tiny model family: a base, three experts and a router, trained on a CPU in about two minutes.

from trainer.lab_family import build
family = build("demo", seed=0)
family.experts["math"], family.router       # ordinary checkpoint folders
"""

from trainer.lab_family.build import Family, FamilyIsBusy, build, family_folder, is_complete
from trainer.lab_family.progress import Progress, ProgressCallback, shown
from trainer.lab_family.recipe import EXPERT_SLOTS, RECIPES, Recipe, Stage
from trainer.lab_family.workers import WorkerFailed

__all__ = [
    "EXPERT_SLOTS",
    "RECIPES",
    "Family",
    "FamilyIsBusy",
    "Progress",
    "ProgressCallback",
    "Recipe",
    "Stage",
    "WorkerFailed",
    "build",
    "family_folder",
    "is_complete",
    "shown",
]
