"""Strict parsers accept all that is written."""

import json

import numpy as np
import pytest

from maskdiff.errors import printable
from maskdiff.files import json_text


def strict(text):
  def refuse(word):
    raise ValueError(word)

  value = json.loads(text, parse_constant=refuse)
  json.dumps(value, ensure_ascii=False).encode()  # no half surrogate pairs
  return value


@pytest.mark.parametrize(
  'value, expected',
  [
    ({'a': 1, 'b': [0.5, True, None, 'ü']}, None),
    ({'a': float('nan'), 'b': [float('inf'), (-float('inf'),)]}, 0),
    ({float('nan'): 1}, {'null': 1}),
    (np.float32('nan'), 0),
    ({'a': np.float32(0.5), 'b': np.int64(3)}, {'a': 0.5, 'b': 3}),
    (np.array([1.0, np.nan]), [1.0, None]),
    ('\ud83d', '\ufffd'),
    ({'\x7f': '\x1b[31m\x9b31m\x80'}, None),
    ({'\udcff': ['x\udc80y']}, {'\ufffd': ['x\ufffdy']}),
    ('\U0001f600 \\ud800', '\U0001f600 \\ud800'),
  ],
)
def test_values_are_strict_json(value, expected):
  for options in ({}, {'ensure_ascii': False}, {'indent': 2}):
    found = strict(json_text.dumps(value, **options))
    if expected is None:
      assert found == value
    elif expected == 0:
      assert 'nan' not in repr(found) and 'inf' not in repr(found)
    else:
      assert found == expected


def test_other_types_are_refused():
  with pytest.raises(TypeError, match='object is not a JSON value'):
    json_text.dumps({'a': object()})


def test_control_characters_are_escaped_as_json():
  for options in ({}, {'ensure_ascii': False}):
    text = json_text.dumps({'\x7f': '\x1b\x9b\n\x7f'}, **options)
    assert text.isprintable()
    assert text == printable(text)  # as files.streams prints it
