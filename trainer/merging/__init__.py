"""Merging: one causal LM out of several that come from one base, without training.

from trainer.merging import MergeMethod, MergeSettings, merge
merge(["experts/math", "experts/code"], output, MergeSettings(MergeMethod.TIES), base="base")
"""

from trainer.merging.folders import ModelFolder
from trainer.merging.methods import MergeMethod, MergeSettings
from trainer.merging.model_merge import MERGE_FILE, MergeProgress, merge

__all__ = ["MERGE_FILE", "MergeMethod", "MergeProgress", "MergeSettings", "ModelFolder", "merge"]
