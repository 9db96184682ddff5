"""Config keys of the device mesh."""

import math

from maskdiff.config.key import Key
from maskdiff.errors import UserError

KEYS = {
  'replica': Key(1, 'Copies of the state, at least one per slice.'),
  'fsdp': Key(
    -1,
    'Devices that divide the state and the rows. -1: all devices that the '
    'other axes leave.',
  ),
  'sequence': Key(1, 'Devices that divide the positions of a row.'),
  'tensor': Key(1, 'Devices that divide every layer.'),
}


def validate_mesh(c, sizes):
  """Checks that batches and rows divide over the devices of a mesh.

  Args:
    c: the config.
    sizes: dict from mesh axis to its size.

  Raises:
    UserError: names the key and a value that is divisible.
  """
  shards = sizes['replica'] * sizes['fsdp']
  for section, parts in (('train', c.train.microbatches), ('eval', 1)):
    batch, unit = c[section].batch, shards * parts
    if batch % unit:
      if c.objective.time_sampling == 'antithetic':
        unit = math.lcm(unit, 2)
      near = max(1, round(batch / unit)) * unit
      over = f'{shards} devices' + (
        f' x {parts} microbatches' if parts > 1 else ''
      )
      raise UserError(
        f'config.{section}.batch={batch} is not divisible by the mesh '
        f'({over}); --config.{section}.batch={near} is'
      )
  if c.data.length % sizes['sequence']:
    raise UserError(
      f'config.data.length={c.data.length} is not divisible by '
      f'config.mesh.sequence={sizes["sequence"]}'
    )
