"""The config: one file per section declares the keys, with their checks.

Files in configs/ call `default()` and change values. Scripts call
`run_script`, which parses the command line. No module here imports JAX.
"""

from maskdiff.config.checks import validate
from maskdiff.config.command_line import (
  WEIGHT_DTYPES,
  define_config_flag,
  define_ema_flag,
  define_load_flags,
  define_sample_flags,
  define_training_flags,
  require_workdir,
  run_script,
)
from maskdiff.config.keys import (
  CHOICES,
  KEYS,
  check_keys,
  choose,
  default,
  flatten,
  from_dict,
  lookup,
)
from maskdiff.config.mesh import validate_mesh
from maskdiff.config.model import extends, scale_rows
from maskdiff.config.settings import (
  parse_pairs,
  sample_settings,
  with_settings,
)

__all__ = [
  'CHOICES',
  'KEYS',
  'WEIGHT_DTYPES',
  'check_keys',
  'choose',
  'default',
  'define_config_flag',
  'define_ema_flag',
  'define_load_flags',
  'define_sample_flags',
  'define_training_flags',
  'extends',
  'flatten',
  'from_dict',
  'lookup',
  'parse_pairs',
  'require_workdir',
  'run_script',
  'sample_settings',
  'scale_rows',
  'validate',
  'validate_mesh',
  'with_settings',
]
