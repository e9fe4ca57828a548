"""The judges of the OpenAI API: what each installs, and which of its points are lost for a reason."""

from __future__ import annotations

from tests.judges.environment import Judge

OPENAI = Judge("openai", ("openai==3.54.0",), "openai_client.py")
SCHEMATHESIS = Judge("schemathesis", ("schemathesis==4.32.5",), "schemathesis_run.py", seconds=240)
LM_EVAL = Judge(
    "lm-eval",
    ("lm-eval[api,hf]==0.4.13", "torch==2.13.0", "transformers==5.23.0"),
    "lm_eval_run.py",
    seconds=300,
)
LITELLM = Judge(
    "litellm",
    ("litellm[mcp]==1.106.2",),
    "litellm_client.py",
    seconds=180,
    variables={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
)
PROVIDER_CHECK = Judge(
    "trustedrouter", ("trustedrouter-provider-check==0.1.8",), "provider_check_run.py", seconds=180
)
COMPATCANARY = Judge("compatcanary", (), "compatcanary_run.py", packages=("compatcanary@0.2.2",))

OF_TALKING = (OPENAI, LITELLM, COMPATCANARY, PROVIDER_CHECK, SCHEMATHESIS)
EXPLAINED: dict[str, dict[str, str]] = {
    COMPATCANARY.name: {
        "responses.basic": "there is no Responses API here",
        "responses.streaming": "there is no Responses API here",
    },
    PROVIDER_CHECK.name: {
        "catalog.declared-v2": "a check of a price list in TrustedRouter's own form, which we have none of; not run",
        "chat.pong": "random weights do not know the word",
        "tools.parallel-deltas": "random weights make one call where two are asked for",
        "tools.round-trip": "not run where the last one had one call",
        "stream.incremental-delivery": "a short answer of a tiny model is ready at once and sent in one write",
    },
    SCHEMATHESIS.name: {
        "requests that fit their schema are not refused": "limits that no schema states: models by name, best_of = n,"
        " tokens that exist, templates, either of two fields, 3.0 where a whole number is wanted",
    },
}
"""By judge and point, why it is, or may be, lost."""
