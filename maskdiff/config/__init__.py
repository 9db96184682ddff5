"""The configuration: every key with its default, type, choices and check.

Files in configs/ call `default()` and change some values. Scripts call
`run_script`, which parses the command line.
"""

from maskdiff.config.checks import CHOICES, WEIGHTS, validate, validate_mesh
from maskdiff.config.command_line import (
  define_config_flag,
  define_load_flags,
  run_script,
)
from maskdiff.config.keys import (
  check_keys,
  choose,
  default,
  flatten,
  from_dict,
  lookup,
)

__all__ = [
  'CHOICES',
  'WEIGHTS',
  'check_keys',
  'choose',
  'default',
  'define_config_flag',
  'define_load_flags',
  'flatten',
  'from_dict',
  'lookup',
  'run_script',
  'validate',
  'validate_mesh',
]
