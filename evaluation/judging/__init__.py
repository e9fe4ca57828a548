"""General quality by pairwise comparison: a model behind an OpenAI API says which of two answers is better."""
