"""launch/maskdiff.service: restarts, signals and the command it starts."""

import configparser
import pathlib
import runpy
import shlex
import shutil
import subprocess

import pytest

from maskdiff import config as config_lib
from maskdiff import errors
from maskdiff.distributed import runtime

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNIT = ROOT / 'launch' / 'maskdiff.service'


@pytest.fixture
def unit():
  parser = configparser.ConfigParser(interpolation=None, delimiters='=')
  parser.optionxform = str
  # A backslash at the end of a line continues it.
  parser.read_string(UNIT.read_text().replace('\\\n', ' '))
  assert parser.sections() == ['Unit', 'Service', 'Install']
  return parser


@pytest.fixture
def service(unit):
  return unit['Service']


def test_only_user_errors_are_not_restarted(service):
  assert service['Restart'] == 'on-failure'
  assert service['RestartPreventExitStatus'] == str(errors.STATUS_USER)
  assert service['RestartForceExitStatus'].split() == [
    str(errors.STATUS_AGAIN),
    'SIGTERM',
  ]
  assert service['SuccessExitStatus'] == str(errors.STATUS_AGAIN)


def test_a_preempted_run_has_time_for_a_checkpoint(service):
  assert service['KillSignal'] == 'SIGTERM'
  assert service['KillMode'] == 'mixed'
  assert int(service['TimeoutStopSec']) >= 120


def test_hosts_waiting_for_each_other_do_not_give_up(unit, service):
  """A lone host ends after JOIN_TIMEOUT_S and is restarted."""
  assert unit['Unit']['StartLimitIntervalSec'] == '1h'
  starts = 3600 / (runtime.JOIN_TIMEOUT_S + int(service['RestartSec']))
  assert int(unit['Unit']['StartLimitBurst']) > 2 * starts


def test_the_started_command_is_valid(service):
  python, script, *arguments = shlex.split(service['ExecStart'])
  assert python == f'{service["WorkingDirectory"]}/.venv/bin/python'
  assert (ROOT / script).exists()
  arguments = dict(a.removeprefix('--').split('=') for a in arguments)
  config = runpy.run_path(str(ROOT / arguments.pop('config')))['get_config']()
  assert arguments.pop('workdir').startswith('/gcs/BUCKET/')
  config.update_from_flattened_dict(
    {key.removeprefix('config.'): value for key, value in arguments.items()}
  )
  config_lib.validate(config)


@pytest.mark.skipif(
  not shutil.which('systemd-analyze'), reason='needs systemd-analyze'
)
def test_systemd_accepts_the_unit(tmp_path):
  unit = tmp_path / UNIT.name
  text = UNIT.read_text().replace('/opt/maskdiff/.venv/bin/python', '/bin/sh')
  unit.write_text(text.replace('USER', 'root'))
  verify = lambda: subprocess.run(
    ['systemd-analyze', 'verify', '--man=no', str(unit)],
    capture_output=True,
    text=True,
  )
  ended = verify()
  ours = [x for x in ended.stderr.splitlines() if UNIT.name in x]
  assert (ended.returncode, ours) == (0, [])
  unit.write_text(unit.read_text().replace('KillMode=', 'KillModus='))
  assert 'KillModus' in verify().stderr
