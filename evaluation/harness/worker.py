"""Runs lm-evaluation-harness, in the environment of its own that it is installed in.

Started by `evaluation.harness.running` as a script in the folder of the tasks; it may import nothing of this project.
It reads one JSON object from standard input and writes what the harness found to the file `output`:

    {"tasks": ["lab_numbers"], "folder": FOLDER or null, "chat": false, "model": {ARGUMENT: VALUE},
     "extra_body": {}, "limit": null, "num_fewshot": null, "batch_size": 8, "output": FILE}

A key comes from $OPENAI_API_KEY. Without tasks all of the folder are run.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.models.openai_completions import LocalCompletionsAPI


def main() -> None:
    """Does what standard input asks for."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    asked = json.load(sys.stdin)
    folder = asked["folder"]
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    found = lm_eval.simple_evaluate(
        model=opened(asked),
        tasks=asked["tasks"] or sorted(manager.all_tasks),
        task_manager=manager,
        limit=asked["limit"],
        num_fewshot=asked["num_fewshot"],
        apply_chat_template=asked["chat"],
        fewshot_as_multiturn=asked["chat"] or None,
        bootstrap_iters=0,
        log_samples=True,
    )
    told = {name: found[name] for name in ("results", "samples", "versions", "configs", "n-samples")}
    told["lm_eval"] = metadata.version("lm_eval")
    draft = Path(asked["output"] + ".draft")
    draft.write_text(json.dumps(told, default=str, ensure_ascii=False, indent=1))
    draft.replace(asked["output"])


def opened(asked: dict[str, Any]) -> LocalCompletionsAPI:
    """`local-completions` or `local-chat-completions`; what is in `extra_body` goes into every request."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    base: type[LocalCompletionsAPI] = LocalChatCompletion if asked["chat"] else LocalCompletionsAPI
    extra = asked["extra_body"]

    class Asked(base):  # type: ignore[misc]  # one of two classes
        def _create_payload(self, *arguments: Any, **named: Any) -> dict[str, Any]:
            return {**super()._create_payload(*arguments, **named), **extra}

    key = os.environ.get("OPENAI_API_KEY") or None
    batch_size = 1 if asked["chat"] else asked["batch_size"]
    return Asked(**asked["model"], batch_size=batch_size, auth_token=key)


if __name__ == "__main__":
    main()
