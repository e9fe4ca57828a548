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
LITELLM = Judge("litellm", ("litellm==1.108.11",), "litellm_client.py", seconds=180)
PROVIDER_CHECK = Judge(
    "trustedrouter", ("trustedrouter-provider-check==0.1.8",), "provider_check_run.py", seconds=180
)

OF_TALKING = (OPENAI,)
EXPLAINED: dict[str, dict[str, str]] = {}
"""By judge and point, why it is lost."""
