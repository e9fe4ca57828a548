"""The lab's tiny model family: a base, three experts and a router, trained on a CPU in about two minutes.

from trainer.lab_family import build
family = build("demo", seed=0)
family.experts["math"], family.router       # ordinary checkpoint folders
families = build_all("full", seeds=(1, 2, 3), names=("cdpo_bias0", "merge_ties"))
families[0].variants["merge_ties"]          # so are these
"""

from trainer.lab_family.build import Family, build, build_all, build_variants
from trainer.lab_family.cache import FamilyIsBusy, family_folder, is_complete
from trainer.lab_family.progress import Progress, ProgressCallback, shown
from trainer.lab_family.recipe import EXPERT_SLOTS, RECIPES, Recipe, Stage
from trainer.lab_family.variants import VARIANTS, Variant, VariantKind
from trainer.lab_family.workers import WorkerFailed

__all__ = [
    "EXPERT_SLOTS",
    "RECIPES",
    "VARIANTS",
    "Family",
    "FamilyIsBusy",
    "Progress",
    "ProgressCallback",
    "Recipe",
    "Stage",
    "Variant",
    "VariantKind",
    "WorkerFailed",
    "build",
    "build_all",
    "build_variants",
    "family_folder",
    "is_complete",
    "shown",
]
