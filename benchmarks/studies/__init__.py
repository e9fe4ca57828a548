"""Studies: what one more knob does to a small lab family, each a short configuration with a page in docs/results.

catalogue   the studies: which routers are trained, what varies, what is looked at
plan        the words they are written in
experts     experts beyond the family's three: halves of a domain, bad ones, noisy ones
workshop    trains what is missing, by the product's own jobs, and keeps it
judging     who is right, by teacher forcing: greedy, and the exact chance when drawing
results     intervals and comparisons of what was judged
page        docs/results/NAME.md and .json
picture     docs/results/NAME.png
"""
