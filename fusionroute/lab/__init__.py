"""The lab: small tasks and a character tokenizer that show the method on a CPU in minutes."""
