"""The data of a run: corpora, token files, and the batches that a run samples from them."""
