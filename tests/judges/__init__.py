"""Clients of other people as judges of our APIs, each in an environment of its own (`make judge-tgi`, ...).

`scoring` is what a judge's script imports, in its own environment: the standard library alone. `environment` is ours:
it makes the environments, serves tiny models, runs the scripts, and reads their scores.
"""
