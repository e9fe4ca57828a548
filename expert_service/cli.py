"""The command `expert-service`."""

from __future__ import annotations

from expert_service.settings import ExpertSettings
from fusionroute.settings import daemon_command


def _run(settings: ExpertSettings) -> int:
    from expert_service.bootstrap import run

    return run(settings)


main = daemon_command(
    "expert-service",
    "Serves one causal language model, full-vocabulary logits over gRPC.\n\n"
    "Example: expert-service --model ./models/math --slot math --port 50061 --router 127.0.0.1:50050",
    ExpertSettings,
    _run,
)
