"""Config keys of the device mesh."""

import math

from maskdiff.config.key import Key
from maskdiff.errors import UserError

KEYS = {
  'replica': Key(
    1,
    'Replicas of parameters and optimizer state; a multiple of the number of '
    'slices.',
  ),
  'fsdp': Key(
    -1,
    'Devices over which parameters, optimizer state and rows are sharded. '
    '-1: all remaining devices.',
  ),
  'sequence': Key(
    1,
    'Devices over which the positions of a row are sharded, and with `fsdp` '
    'the state.',
  ),
  'tensor': Key(1, 'Tensor parallelism: devices that share each layer.'),
}


def validate_mesh(c, sizes):
  """Checks that the mesh can shard the batches and rows of a config.

  Args:
    c: the config.
    sizes: dict from mesh axis to its size.

  Raises:
    UserError: a batch or config.data.length is not divisible. Names the key.
  """
  shards = sizes['replica'] * sizes['fsdp']
  for section, parts in (('train', c.train.microbatches), ('eval', 1)):
    batch, unit = c[section].batch, shards * parts
    if batch % unit:
      if c.objective.time_sampling == 'antithetic':
        unit = math.lcm(unit, 2)
      near = max(1, round(batch / unit)) * unit
      divisor = f'{shards} devices' + (
        f' x {parts} microbatches' if parts > 1 else ''
      )
      raise UserError(
        f'config.{section}.batch={batch} is not divisible by the mesh '
        f'({divisor}); --config.{section}.batch={near} is'
      )
  if c.data.length % sizes['sequence']:
    raise UserError(
      f'config.data.length={c.data.length} is not divisible by '
      f'config.mesh.sequence={sizes["sequence"]}'
    )
