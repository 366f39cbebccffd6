"""The data of a run: a corpus, its token files, and the batches that are drawn from them."""
