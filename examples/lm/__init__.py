"""The parts of the training scripts, one idea a file, in the order in which a run uses them.

options       what both command lines have; gpt2_options and bert_options add their own
command       around a run: reading text, errors, the output folder, writing results
corpus        documents: which text, and which of it is held out
tokenizer     byte-level BPE or WordPiece of a corpus, or one that exists
packing       documents -> blocks of fixed length on disk -> the batches of a step
masking       documents -> pieces, packs of pieces, masks -> the batches of BERT
model         random weights, and the attention that was asked for
gpt2, bert    sizes and configurations; BERT's head where there is a label
fused_loss    output layer and loss in one, by liger-kernel
training      one optimizer step, the loop
watching      BERT's loop is the Trainer's: speed, limits, verified checkpoints
perplexity    held-out perplexity, by place in the block
checkpoints   save, verify, resume
comparison    several attentions, step by step on the same batches
results       what a run leaves behind: JSON, and the lines printed at the end
"""
