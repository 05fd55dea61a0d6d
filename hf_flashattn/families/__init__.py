"""Models that compute their attention themselves, on our kernels all the same.

table.py      which classes, what is particular to each, and why some stay out of reach
deferred.py   reads the attention off a module's own code while it runs
rules.py      what may be done to scores on the way, operation by operation
recognise.py  dense masks that are only padding, or only causal
forward.py    what takes the place of a module's forward: the pieces above put together
unpatched.py  masks for such models where only a name says ours
"""
