"""Text to batches: tokenizer, sources, records, prepare, pipeline.

Read in that order. `prepare` turns documents into fixed-length rows on disk,
once; `pipeline` reads them in an order that is a pure function of the seed and
the sample index, so no host count, batch size or restart can change it.
"""
