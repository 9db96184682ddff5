"""Damages files and JSON values at random, to test code that reads them.

Give a seeded `random.Random`: the same seed makes the same damage, so a test
that fails can name the seed.
"""

import json

# Bytes that matter to parsers, also of binary formats with lengths in front.
TOKENS = (
  *(b'', b'\n', b'\r\n', b'\0', b'"', b'\\', b'{', b'}', b'[', b']', b','),
  *(b'null', b'true', b'NaN', b'-Infinity', b'1e999', b'-1', b'0', b'9' * 400),
  *(b'9' * 5000, b'\xff\xfe', b'\xef\xbb\xbf', b'\xc3', b'\xed\xa0\x80'),
  *(b'\\ud800', b'\\u0000', b'\\u2028', b'\x1b[2J', b'</script>'),
  *(b'[' * 200, b'[' * 100_000, b'{"a":' * 200, b'{"a":' * 30_000),
  *(b'\xff' * 8, b'\0' * 8, b'\0' * 7 + b'\x80', b'x' * 10_000),
)
NUMBERS = (
  *(0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63),
  *(-(2**63), 2**64, 10**18, 10**400, -(10**400), 0.5, -0.0, 1e-300, 1e300),
  *(float('nan'), float('inf'), -float('inf')),
)
TEXTS = (
  *('', ' ', '0', '-1', 'nan', 'x' * 1000, '../x', '/etc/passwd', '\0', '\n'),
  *('..', '.', '</script><script>alert(1)</script>', '\u2028', '\x1b[31m'),
  *('\ud800', '\U0010ffff', '{}', '%s', '\N{ARABIC-INDIC DIGIT ONE}'),
)


def mutated_bytes(rng, content):
  """Returns bytes with one to four random damages.

  Bits flip; parts are cut off, dropped, repeated, swapped, or replaced by
  bytes that matter to parsers.

  Args:
    rng: random.Random.
    content: bytes.
  """
  for _ in range(rng.randint(1, 4)):
    first, end = sorted(rng.randint(0, len(content)) for _ in range(2))
    # Small damages reach deeper code than large ones.
    if rng.random() < 0.7:
      end = min(end, first + rng.choice((0, 1, 2, 8, 32)))
    before, part, after = content[:first], content[first:end], content[end:]
    match rng.randrange(7):
      case 0:
        flipped = [x ^ (1 << rng.randrange(8)) for x in part[:4]]
        content = before + bytes(flipped) + part[4:] + after
      case 1:
        content = before
      case 2:
        content = before + after
      case 3:
        content = before + part * rng.choice((2, 3, 10)) + after
      case 4:
        content = after + part + before
      case 5:
        content = before + rng.choice(TOKENS) + part + after
      case 6:
        content = before + rng.choice(TOKENS) + after
  return content


def mutated_json(rng, value):
  """Returns a JSON value with one to three random damages; keeps `value`.

  Values change their type or become extreme numbers or texts; entries are
  dropped, added, repeated, renamed or swapped; values are nested deeply.
  `json.dumps` can write the result, which may hold NaN, infinities and lone
  surrogates. It may be nested a few hundred levels deep.

  Args:
    rng: random.Random.
    value: JSON value. It is not modified.
  """
  value = json.loads(json.dumps(value))
  for _ in range(rng.randint(1, 3)):
    holders = list(_holders(value))
    if not holders or rng.random() < 0.03:
      value = _mutated_value(rng, value)
    else:
      _damage(rng, rng.choice(holders))
  return value


def _holders(value):
  """Yields the dicts and lists of a JSON value that are not empty."""
  waiting = [value]
  while waiting:
    value = waiting.pop()
    if isinstance(value, (dict, list)) and value:
      yield value
      waiting += value.values() if isinstance(value, dict) else value


def _damage(rng, holder):
  """Modifies an entry of a dict or list in place."""
  is_dict = isinstance(holder, dict)
  key = rng.choice(list(holder) if is_dict else range(len(holder)))
  match rng.randrange(8):
    case 0:
      del holder[key]
    case 1 if is_dict:
      holder[rng.choice((*TEXTS, *map(str, NUMBERS)))] = holder.pop(key)
    case 1:
      holder.insert(key, _copy(holder[key]))
    case 2 if is_dict:
      holder[rng.choice(TEXTS)] = _extreme(rng)
    case 2:
      holder[key:key] = [_extreme(rng)] * rng.choice((1, 3, 100))
    case 3:
      other = rng.choice(list(holder) if is_dict else range(len(holder)))
      holder[key], holder[other] = holder[other], holder[key]
    case _:
      holder[key] = _mutated_value(rng, holder[key])


def _mutated_value(rng, value):
  """Returns another value, often one that is close to the old one."""
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  match rng.randrange(6):
    case 0 if number:
      return value + rng.choice((-1, 1))
    case 1 if number:
      return -value
    case 2 if number:
      return rng.choice((str(value), [value], bool(value)))
    case 0 if isinstance(value, str):
      return value + rng.choice(TEXTS)
    case 1 if isinstance(value, str):
      return value[: rng.randint(0, len(value))]
    case 2 if isinstance(value, str):
      return [value]
    case 3:
      for _ in range(rng.choice((1, 150))):
        value = [value] if rng.random() < 0.5 else {'x': value}
      return value
    case _:
      return _extreme(rng)


def _extreme(rng):
  """Returns a value of any JSON type."""
  return rng.choice(
    (
      *(rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS)),
      *(None, True, False, [], {}, [[]], {'': None}),
    )
  )


def _copy(value):
  return json.loads(json.dumps(value))
