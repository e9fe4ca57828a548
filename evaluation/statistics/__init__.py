"""How sure a measured share is, and how sure a difference between two systems is."""
