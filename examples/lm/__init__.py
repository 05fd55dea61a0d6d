"""The parts of `train_gpt2.py`, one idea a file, in the order in which a run uses them.

corpus       documents: which text, and which of it is held out
tokenizer    the byte-level BPE of a corpus, or one that exists
packing      documents -> blocks of fixed length on disk -> the batch of a step
model        GPT-2 in any size, with the attention that was asked for
training     one optimizer step, held-out perplexity, the loop
checkpoints  save, verify, resume
comparison   several attentions, step by step on the same batches
results      what a run leaves behind: JSON, and the lines printed at the end
"""
