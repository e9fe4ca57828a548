"""Tasks of lm-evaluation-harness, asked of a router over its OpenAI API, in our form of findings."""
