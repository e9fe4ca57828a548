"""One Hugging Face causal LM with the caches of many sessions; runs experts and routers alike."""

from fusionroute.engine.batcher import Engine
from fusionroute.engine.digest import digest
from fusionroute.engine.model import LoadedModel, ModelFacts, load_model, prepare_model
from fusionroute.engine.session import Closing, Draft, SessionView, StepCall
from fusionroute.engine.steps import EngineLimits, EngineLoad, StepOutcome

__all__ = [
    "Closing",
    "Draft",
    "Engine",
    "EngineLimits",
    "EngineLoad",
    "LoadedModel",
    "ModelFacts",
    "SessionView",
    "StepCall",
    "StepOutcome",
    "digest",
    "load_model",
    "prepare_model",
]
