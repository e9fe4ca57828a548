"""The operator's command line: `fusionroute`. One file per noun; what is slow is imported inside commands."""

from __future__ import annotations

from fusionroute.cli.group import CommandGroup

main = CommandGroup(
    name="fusionroute",
    commands_at={
        "demo": "fusionroute.cli.demo:demo",
        "up": "fusionroute.cli.stack:up",
        "down": "fusionroute.cli.stack:down",
        "status": "fusionroute.cli.status:status",
        "logs": "fusionroute.cli.stack:logs",
        "generate": "fusionroute.cli.generate:generate",
        "experts": "fusionroute.cli.experts:experts",
        "train": "fusionroute.cli.train:train",
        "jobs": "fusionroute.cli.jobs:jobs",
        "checkpoints": "fusionroute.cli.checkpoints:checkpoints",
        "models": "fusionroute.cli.model_folders:models",
        "lab": "fusionroute.cli.lab:lab",
        "eval": "fusionroute.cli.eval:evaluation_group",
        "bench": "fusionroute.cli.bench:bench",
        "doctor": "fusionroute.cli.doctor:doctor",
    },
    help="""Several specialised language models write one answer together, token by token.

    \b
    Example:
      fusionroute demo                         everything once, on tiny models
      fusionroute up --lab                     a stack to play with
      fusionroute generate 'box: 4+4; rev jbef='
      fusionroute down

    \b
    Exit codes:
      0 done   1 failed   2 wrong usage   3 nobody there, or too busy
      4 refused by the service   130 interrupted
    """,
)
