"""Changing who serves a slot while answers are being written: tried beside the old one, one step to flip, no gap."""
