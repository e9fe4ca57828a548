"""Instructions that a program can check, as the benchmark IFEval has them (arXiv 2311.07911), 25 kinds.

Each kind is a small frozen class with the name that the field gives it and the arguments of the data set;
`registry.instruction` builds one, `judging.verify` judges answers. The kinds are written from the paper's table of
instructions. Where that table leaves a question open they decide as the implementation of the paper's authors is
known to, so that numbers compare; where they decide otherwise on purpose, the class says "Differs".
"""
