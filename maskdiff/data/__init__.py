"""Text to token rows on disk, and rows to batches on devices.

tokenizer: text to token ids and back (sentencepiece_model, byte_level).
tokenizer_files: names of tokenizer files; tokenizer_json, vocabulary_files,
  bpe_vocabulary, split_patterns: check byte-level tokenizers of others.
tokenizer_training: trains SentencePiece models.
sources: finds input files and cuts them into parts; readers: their formats.
source_files: which files of a folder are input; unpack: .gz and .zst.
prepare: writes the rows of a corpus; shards: the rows of one part.
rows: Rows of tokens, documents and answers; row_writer: writes such rows.
records: format of the rows on disk; row_reader: reads and verifies them.
manifest_fields: checks the manifest of rows, which is not trusted.
first_run: from text to the command that trains on it.
order: which row is sample s, a pure function of the seed and s.
samples: cuts rows into samples of the training length.
pipeline: batches of samples, sharded over devices.
"""
