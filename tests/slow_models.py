"""A model that takes its time, for tests of what happens while it computes."""

from __future__ import annotations

import time
from typing import Any

from fusionroute.engine.model import LoadedModel


class SlowModel:
    """A loaded model each of whose forwards takes so many seconds more."""

    def __init__(self, model: LoadedModel, seconds: float) -> None:
        self._model, self._seconds = model, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """As the model's."""
        time.sleep(self._seconds)
        return self._model.forward(*arguments, **options)
