"""Conversations of files to documents, for data.prepare."""

import bisect
import dataclasses
import functools
import json
from collections.abc import Iterator

from maskdiff.data import sources
from maskdiff.data.documents import BadRecord, Document
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError, inline
from maskdiff.files import reading
from maskdiff.files.paths import local_path
from maskdiff.posttraining import (
  chat,
  chat_tokens,
  conversations,
  length_tokens,
)

TURNS = ('last', 'all', 'each')
TRUNCATE = ('drop', 'right', 'turns')
NO_ANSWER = 'without an answer to learn'
TOO_LONG = 'too long'
EQUAL = 'with two equal answers'
NO_BUCKET = 'with an answer longer than the largest of --length_buckets'

encoder = functools.lru_cache(maxsize=1)(chat_tokens.encoder)


@dataclasses.dataclass(frozen=True)
class ChatDocuments:
  """Function from a part of the input to documents; shards.Job.encode.

  Attributes:
    template: chat.Template.
    row_length: tokens of the longest document.
    turns: which answers are learned: 'last', the last one of a conversation;
      'all'; or 'each', all of them, each in a document of its own that ends
      with it. `train` of a message overrides 'last' and 'all', and with 'each'
      leaves an answer out.
    truncate: what becomes of longer conversations: 'drop'; 'right', keep the
      first tokens, unless none of them is learned; or 'turns', leave out turns
      from the start, except for system turns, until the rest fits.
    length_tokens: pairs (length, token id) of length_tokens.choose; () trains
      answers without lengths.
    pairs: whether records have a chosen and a rejected answer, which become two
      documents of at most half a row each, in this order.
  """

  template: chat.Template
  row_length: int
  turns: str = 'last'
  truncate: str = 'drop'
  length_tokens: tuple[tuple[int, int], ...] = ()
  pairs: bool = False

  @property
  def settings(self) -> dict[str, str]:
    """The settings that decide the rows, for a manifest."""
    found = {
      'chat': self.template.fingerprint,
      'chat_arguments': self.template.arguments,
      'turns': self.turns,
      'truncate': self.truncate,
    }
    if self.length_tokens:
      named = length_tokens.to_setting(self.length_tokens)
      found[length_tokens.SETTING] = named
    return found

  def save_template(self, directory: str) -> None:
    """Writes the template beside the rows, for sampling and exports."""
    chat.save(self.template, local_path(directory))

  def __call__(
    self, part: sources.Part, tokenizer: Tokenizer, skipped: dict[str, int]
  ) -> Iterator[Document]:
    """Yields the documents of a part.

    Args:
      part: the part, of a plan of records.
      tokenizer: Tokenizer.
      skipped: numbers of conversations that are left out, by reason; modified.

    Raises:
      BadRecord: a record is not a conversation or a pair, or cannot be encoded.
        The message has the file and the line.
      UserError: a file is damaged.
    """
    encode = encoder(self.template, tokenizer)
    of_record = self._of_pair if self.pairs else self._of_conversation
    for record, place in sources.read_records(part):
      try:
        documents = of_record(encode, _value(record))
      except UserError as e:
        where = sources.where(*place)
        raise BadRecord(f'{where}: {inline(e)}') from e
      for document in documents:
        if isinstance(document, str):
          skipped[document] = skipped.get(document, 0) + 1
        else:
          yield document

  def _of_conversation(self, encode, record) -> list[Document | str]:
    """Returns the documents of a record, or why some are left out."""
    messages = conversations.parse(record)
    examples, key = _examples(messages, self.turns), _key(messages)
    found = [d for e in examples for d in self._documents(encode, key, *e)]
    return found or [NO_ANSWER]

  def _of_pair(self, encode, record) -> list[Document | str]:
    """Returns the documents of both answers, or why they are left out."""
    pair = conversations.parse_pair(record)
    encoded = [chat_tokens.encode(encode, m, [len(m) - 1]) for m in pair]
    chosen, rejected = (e.tokens.tolist() for e in encoded)
    if chosen == rejected:
      return [EQUAL]
    if 2 * max(len(chosen), len(rejected)) > self.row_length:
      return [TOO_LONG]
    return [Document(_key(pair[0]), *e) for e in encoded]

  def _documents(
    self, encode, key, messages, trained
  ) -> list[Document] | list[str]:
    """Returns the documents of a conversation, or why it is left out."""
    encoded = chat_tokens.encode(encode, messages, trained)
    bucket, room = None, self.row_length
    if self.length_tokens:
      if len(trained) > 1:
        raise UserError(
          'several answers of the conversation are learned, but '
          '--length_buckets needs documents with one: choose --turns=each'
        )
      size = int(encoded.answer.sum())
      bucket = length_tokens.bucket(self.length_tokens, size)
      if bucket is None:
        return [NO_BUCKET]
      room -= 1 + bucket[0] - size
    whole = len(encoded.tokens) <= room
    if not whole and self.truncate == 'turns':
      encoded = _without_first_turns(encode, messages, trained, room)
    elif not whole and self.truncate == 'right' and encoded.answer[:room].any():
      encoded = chat_tokens.Encoded(*(x[:room] for x in encoded))
    elif not whole:
      encoded = None
    if encoded is None:
      return [TOO_LONG]
    found = [encoded]
    if bucket:
      eos_id = encode.tokenizer.eos_id
      found = length_tokens.documents(encoded, *bucket, eos_id)
    return [Document(key, *e, truncated=not whole) for e in found]


def _without_first_turns(
  encode, messages, trained, length: int
) -> chat_tokens.Encoded | None:
  """Returns the longest end of a conversation that has at most `length` tokens.

  It begins with a turn of the user, after the system turns at the start. None:
  no such end has a trained turn.
  """
  roles = [message['role'] for message in messages]
  first = next((i for i, r in enumerate(roles) if r != 'system'), len(roles))
  users = [i for i in range(first + 1, len(roles)) if roles[i] == 'user']

  def end(start):
    kept = [i - start + first for i in trained if i >= start]
    turns = [*messages[:first], *messages[start:]]
    return chat_tokens.encode(encode, turns, kept) if kept else None

  fits = lambda start: (e := end(start)) is None or len(e.tokens) <= length
  at = bisect.bisect_left(users, True, key=fits)
  return end(users[at]) if at < len(users) else None


def _examples(messages, turns: str) -> list[tuple[list, list[int]]]:
  """Returns (messages, trained turns) of each document of a conversation."""
  answers = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
  default = answers[-1:] if turns == 'last' else answers
  trained = [i for i in answers if messages[i].get('train', i in default)]
  if turns == 'each':
    return [(messages[: i + 1], [i]) for i in trained]
  return [(messages, trained)] if trained else []


def _key(messages) -> str:
  """Returns the turns before the first answer, which decide the split."""
  roles = [message['role'] for message in messages]
  first = roles.index('assistant') if 'assistant' in roles else len(roles)
  turns = [(m['role'], m['content']) for m in messages[:first]]
  return json.dumps(turns, ensure_ascii=False)


def _value(record):
  """Returns the JSON value of a record; see sources.read_records."""
  if not isinstance(record, bytes):
    return record
  # The error begins with the name, and the caller adds the place.
  return reading.parse_json(record, 'the line')
