"""Checkpoints of other projects: read, written, compared, started from.

load          a model, or its parameters, from a work directory or a Hugging
              Face folder; the start of a run from such parameters
convert       a Hugging Face folder to a work directory and back; a comparison
              of logits
hf            Hugging Face folders, opened as leaves and written from leaves
hf_tokenizer  the tokenizer of a Hugging Face folder
families      published architectures as data: config keys, tensor names, shapes
safetensors   the file format
leaves        parameters on disk, read by slices
reference     logits of the published architectures in NumPy
"""
