"""The walk over Transformers' models that docs/coverage.py makes its page from.

tasks.py           which models there are, by what they are for
configs.py         their configs made tiny, and the model of one
inputs.py          batches for any of them
recipes.py         configs of those that are one of a kind
recipe_batches.py  and their batches
examine.py         one model, eager against patched: what differs, what ran where
processes.py       each model in a process of its own
page.py            the table, written and read back
"""
