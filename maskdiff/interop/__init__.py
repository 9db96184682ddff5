"""Reads, writes and compares Hugging Face folders, and starts runs from them.

load           loads a model from a work directory or a Hugging Face folder, and
               the initial parameters of a run (warm start)
convert        converts a Hugging Face folder to a work directory and back;
               compares logits
hf             opens Hugging Face folders as leaves, and writes them from leaves
hf_tokenizer   the tokenizer of a Hugging Face folder
families       published architectures as data
config_json    reads a published config.json; config_export writes it
tensor_layout  names, shapes and axes of published tensors
safetensors    the file format
leaves         parameters on disk, read by slices
reference      logits of the published architectures in NumPy
"""
