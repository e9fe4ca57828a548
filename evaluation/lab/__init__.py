"""The lab evaluated: its systems, what each of them makes of every question, and what that shows."""
