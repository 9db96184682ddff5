"""Text to token rows on disk, and rows to batches on devices.

tokenizer: text to token ids and back (sentencepiece_model, byte_level).
tokenizer_files: names of tokenizer files; tokenizer_json, vocabulary_files,
  bpe_vocabulary, split_patterns: check byte-level tokenizers of others.
sources: finds input files and cuts them into parts; readers: their formats.
prepare: writes the rows of a corpus; shards: the rows of one part.
rows: Rows of tokens, documents and answers; row_writer: writes such rows.
records: format of the rows on disk; row_reader: reads and verifies them.
order: which row is sample s, a pure function of the seed and s.
samples: cuts rows into samples of the training length.
pipeline: batches of samples, sharded over devices.
paths: resolves gs:// paths to a mounted bucket.
"""
