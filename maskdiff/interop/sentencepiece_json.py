"""A SentencePiece model as tokenizer.json, which transformers loads.

AutoTokenizer needs the class of a model to load tokenizer.model, but loads any
tokenizer.json. The two give the same ids, except for texts with names of
control symbols, such as <eos>, which transformers encodes as these symbols, and
for the character U+2581, which stands for a space in the file. In a unigram
model, names of bytes such as <0x41> may also become these bytes.
"""

import json
import os

from maskdiff.data import sentencepiece_model as spm
from maskdiff.data import tokenizer_files
from maskdiff.files import atomic

CONFIG = 'tokenizer_config.json'
_KINDS = ('bos', 'eos', 'pad', 'mask')
# Too low for the best segmentation of a unigram model to contain the piece.
_NEVER = -1e9


def write(folder, tokenizer, length):
  """Writes tokenizer.json and tokenizer_config.json beside tokenizer.model.

  Args:
    folder: folder of the export.
    tokenizer: data.tokenizer.Tokenizer of a SentencePiece model.
    length: the longest row of the network, in tokens.

  Raises:
    UserError: a file cannot be written.
  """
  names = {f'{k}_token': f'<{k}>' for k in _KINDS}
  config = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': length,
    'unk_token': tokenizer.processor.id_to_piece(tokenizer.processor.unk_id()),
    **names,
  }
  files = {tokenizer_files.JSON: convert(tokenizer.processor), CONFIG: config}
  for name, fields in files.items():
    text = json.dumps(fields, ensure_ascii=False, indent=1) + '\n'
    atomic.write(os.path.join(folder, name), text)


def convert(processor):
  """Returns the contents of tokenizer.json, a dict.

  Args:
    processor: sentencepiece.SentencePieceProcessor of a lossless model, see
      data.sentencepiece_model.
  """
  kinds, is_bpe = spm.kinds(processor.serialized_model_proto())
  # Symbols for line breaks are matched before spaces are replaced.
  pieces = [processor.id_to_piece(i) for i in range(len(kinds))]
  pieces = [
    piece.replace(spm.SPACE, ' ') if kind == spm.USER_DEFINED else piece
    for kind, piece in zip(kinds, pieces, strict=True)
  ]
  scores = [processor.get_score(i) for i in range(len(kinds))]
  added = [
    {
      'id': i,
      'content': piece,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
      'special': kind != spm.USER_DEFINED,
    }
    for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
    if kind in (spm.CONTROL, spm.UNKNOWN, spm.USER_DEFINED)
  ]
  if is_bpe:
    model = {
      'type': 'BPE',
      'unk_token': pieces[processor.unk_id()],
      'fuse_unk': False,
      'byte_fallback': True,
      'vocab': {piece: i for i, piece in enumerate(pieces)},
      'merges': merges(pieces, scores, kinds),
    }
  else:
    model = {
      'type': 'Unigram',
      'unk_id': processor.unk_id(),
      'byte_fallback': True,
      'vocab': [
        [piece, score if kind == spm.NORMAL else _NEVER]
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
      ],
    }
  space = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': spm.SPACE}
  text = {'type': 'Replace', 'pattern': {'String': spm.SPACE}, 'content': ' '}
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added,
    'normalizer': space,
    'pre_tokenizer': None,
    'post_processor': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [text, {'type': 'ByteFallback'}, {'type': 'Fuse'}],
    },
    'model': model,
  }


def merges(pieces, scores, kinds):
  """Returns the merges of a BPE model, pairs of pieces in order.

  SentencePiece stores no merges. It joins the two neighbours whose union is the
  piece of the highest score, so every division of a piece into two pieces is a
  merge, with the rank of the piece.
  """
  normal = {
    piece: score
    for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    if kind == spm.NORMAL
  }
  found = []
  for piece in sorted(normal, key=lambda piece: -normal[piece]):
    for i in range(1, len(piece)):
      left, right = piece[:i], piece[i:]
      if left in normal and right in normal:
        found.append([left, right])
  return found
