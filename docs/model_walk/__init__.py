"""The walk over Transformers' models that docs/coverage.py makes its page from.

tasks.py      which models there are, by what they are for
configs.py    their configs made tiny, and the model of one
inputs.py     batches for any of them
examine.py    one model, eager against patched: what differs, what ran where
processes.py  each model in a process of its own
page.py       the table, written and read back
"""
