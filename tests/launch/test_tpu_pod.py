"""launch/tpu_pod.sh with a fake gcloud.

The fake records its calls. It runs the commands for the hosts of a slice in a
directory of that slice.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'launch' / 'tpu_pod.sh'
WHERE = ('--name', 'pod', '--zone', 'us-east5-a')

GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys
here, arguments = pathlib.Path(os.environ['FAKE']), sys.argv[1:]
with open(here / 'calls', 'a') as f:
  f.write(json.dumps(arguments) + '\\n')
if 'describe' in arguments:
  states = (here / 'states').read_text().split()
  (here / 'states').write_text(' '.join(states[1:] or states))
  print(states[0])
if 'scp' in arguments:
  if arguments[4].endswith('.env'):
    with open(here / 'modes', 'a') as f:
      f.write('%o\\n' % (os.stat(arguments[4]).st_mode & 0o777))
  shutil.copy(arguments[4], here / arguments[5].strip(':'))
if 'ssh' in arguments:
  home = here / arguments[4]
  (command,) = [a for a in arguments if a.startswith('--command=')]
  sys.exit(subprocess.run(
    ['bash', '-c', command.removeprefix('--command=')],
    cwd=home,
    env=os.environ | {{'HOME': str(home)}},
  ).returncode)
"""

PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "${COLOUR:-none}" "$@" >../arguments
while true; do sleep 0.1; done
"""


def write_program(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path):
  """A directory with the fake gcloud and the hosts of pod-0 and pod-1."""
  write_program(tmp_path / 'bin' / 'gcloud', GCLOUD)
  (tmp_path / 'states').write_text('ACTIVE')
  for node in ('pod-0', 'pod-1'):
    write_program(tmp_path / node / 'maskdiff/.venv/bin/python', PYTHON)
  yield tmp_path
  for pid in tmp_path.glob('pod-*/maskdiff.pid'):
    subprocess.run(['kill', '-KILL', pid.read_text().strip()])


def pod(cloud, *arguments):
  """Runs the script; returns the finished process."""
  return subprocess.run(
    ['bash', SCRIPT, *arguments],
    env=os.environ
    | {'FAKE': str(cloud), 'PATH': f'{cloud / "bin"}:{os.environ["PATH"]}'},
    capture_output=True,
    text=True,
    timeout=60,
  )


def dry(cloud, *arguments):
  """Returns the commands of a dry run, each a list of words."""
  result = pod(cloud, arguments[0], '--dry_run', *arguments[1:])
  assert (result.returncode, result.stderr) == (0, '')
  assert not (cloud / 'calls').exists()
  # The printed commands are quoted for a shell, so a shell reads them.
  again = 'gcloud() { printf "%s\\0" gcloud "$@"; printf "\\0"; }\n'
  read = subprocess.run(
    ['bash', '-c', again + result.stdout], capture_output=True, check=True
  )
  commands = read.stdout.decode().removesuffix('\0\0').split('\0\0')
  return [command.split('\0') for command in commands]


def calls(cloud):
  return [json.loads(c) for c in (cloud / 'calls').read_text().splitlines()]


def test_one_slice_is_one_node(cloud):
  create = ('create', *WHERE, '--type=v5p-128', '--runtime', 'v2-alpha-tpuv5')
  (command,) = dry(cloud, *create, '--spot', '--project', 'p')
  assert command == (
    'gcloud compute tpus queued-resources create pod '
    '--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 '
    '--node-id=pod --spot --zone=us-east5-a --project=p'
  ).split(' ')


def test_several_slices_are_numbered(cloud):
  create = ('create', *WHERE, '--type=v5e-16', '--runtime=v2-alpha-tpuv5-lite')
  (command,) = dry(cloud, *create, '--slices', '2')
  assert {'--node-count=2', '--node-prefix=pod'} <= set(command)
  assert not [word for word in command if word.startswith('--node-id')]
  ssh = dry(cloud, 'stop', *WHERE, '--slices', '2')
  assert [c[5] for c in ssh] == ['pod-0', 'pod-1']
  assert all('--worker=all' in c for c in ssh)


def test_watch_follows_the_first_process(cloud):
  (command,) = dry(cloud, 'watch', *WHERE, '--slices=2')
  assert command[3:7] == ['tpu-vm', 'ssh', 'pod-0', '--worker=0']


@pytest.mark.parametrize(
  'script', ['pretrain', 'finetune', 'preferences', 'rl']
)
def test_start_runs_the_script_that_is_named(cloud, script):
  named = ['--script', script] * (script != 'pretrain')
  (command,) = dry(cloud, 'start', *WHERE, *named, '--', '--workdir', 'x')
  line = f'.venv/bin/python launch/{script}.py --workdir x'
  assert f'nohup setsid {line} ' in command[7]


def test_delete_asks_first_unless_yes(cloud):
  (command,) = dry(cloud, 'delete', *WHERE)
  assert command[3:7] == ['queued-resources', 'delete', 'pod', '--force']
  assert '--quiet' not in command
  (command,) = dry(cloud, 'delete', *WHERE, '--yes')
  assert '--quiet' in command


def test_create_waits_until_the_machines_are_ready(cloud):
  write_program(cloud / 'bin' / 'sleep', '#!/bin/sh\n')
  create = ('create', *WHERE, '--type=v5e-16', '--runtime=r')
  (cloud / 'states').write_text('ACCEPTED PROVISIONING ACTIVE')
  result = pod(cloud, *create)
  assert result.returncode == 0, result.stderr
  assert [c[3] for c in calls(cloud)] == ['create'] + ['describe'] * 3
  (cloud / 'states').write_text('ACCEPTED FAILED')
  result = pod(cloud, *create)
  assert result.returncode == 1
  assert 'error: pod was not created' in result.stderr


def wait_for(path):
  deadline = time.monotonic() + 20
  while not path.exists():
    assert time.monotonic() < deadline, path
    time.sleep(0.05)
  time.sleep(0.1)
  return path.read_text()


@pytest.mark.slow
def test_a_run_starts_and_stops_on_every_host(cloud):
  slices = (*WHERE, '--slices=2')
  given = ['--workdir', '/gcs/b/my run', "--config.sample.prompts=('a $b\"',)"]
  start = ('start', *slices, '--env', "COLOUR=it's red", '--', *given)
  result = pod(cloud, *start)
  assert result.returncode == 0, result.stderr
  for node in ('pod-0', 'pod-1'):
    colour, script, *arguments = wait_for(
      cloud / node / 'arguments'
    ).splitlines()
    assert (colour, script) == ("it's red", 'launch/pretrain.py')
    assert arguments == given
  # The value is in no command line, and its file had mode 600 and is gone.
  assert "it's" not in (cloud / 'calls').read_text()
  assert (cloud / 'modes').read_text() == '600\n600\n'
  assert not list(cloud.glob('pod-*/maskdiff.env'))

  assert pod(cloud, 'status', *slices).stdout.count('runs') == 2
  again = pod(cloud, *start)
  assert again.returncode == 1
  assert 'a run is already active' in again.stderr

  pids = [int(p.read_text()) for p in cloud.glob('pod-*/maskdiff.pid')]
  assert pod(cloud, 'stop', *slices).returncode == 0
  assert pod(cloud, 'status', *slices).stdout.count('does not run') == 2
  for pid in pids:
    assert not pathlib.Path(f'/proc/{pid}/cmdline').exists()
  assert pod(cloud, 'stop', *slices).returncode == 0  # nothing to stop


@pytest.mark.slow
def test_a_variable_can_come_from_this_shell(cloud, monkeypatch):
  monkeypatch.setenv('COLOUR', 'blue\n$x')
  start = ('start', *WHERE, '--slices=2', '--env', 'COLOUR')
  (scp, _, ssh, _) = dry(cloud, *start, '--', '--workdir', 'x')
  assert scp[3:5] == ['tpu-vm', 'scp'] and 'blue' not in str(scp + ssh)
  assert pod(cloud, *start, '--', '--workdir', 'x').returncode == 0
  assert wait_for(cloud / 'pod-0' / 'arguments').startswith('blue\n$x\n')
  assert 'blue' not in (cloud / 'calls').read_text()
  assert pod(cloud, 'stop', *WHERE, '--slices=2').returncode == 0


def test_stop_waits_before_it_kills(cloud):
  (command,) = dry(cloud, 'stop', *WHERE)
  assert '--command=grace=300\n' in command[7]
  stubborn = PYTHON.replace('\n', "\ntrap '' TERM\n", 1)
  for node in ('pod-0', 'pod-1'):
    write_program(cloud / node / 'maskdiff/.venv/bin/python', stubborn)
  slices = (*WHERE, '--slices=2')
  assert pod(cloud, 'start', *slices, '--', 'x').returncode == 0
  for node in ('pod-0', 'pod-1'):
    wait_for(cloud / node / 'arguments')
  pids = [int(p.read_text()) for p in cloud.glob('pod-*/maskdiff.pid')]
  result = pod(cloud, 'stop', *slices, '--grace=1')
  assert result.returncode == 0
  assert result.stderr.count('killed, since it had not ended after 1 s') == 2
  commands = [pathlib.Path(f'/proc/{pid}/cmdline') for pid in pids]
  # A process that was killed, but not yet reaped, has an empty command line.
  assert not any(path.exists() and path.read_bytes() for path in commands)


def test_install_copies_the_checkout_to_every_slice(cloud):
  if not (ROOT / '.git').exists():
    pytest.skip('not a git checkout')
  for node in ('pod-0', 'pod-1'):  # a uv that is installed already
    write_program(
      cloud / node / '.local' / 'bin' / 'uv',
      f'#!/bin/sh\necho "$PWD $@" >{cloud / node / "uv"}\n',
    )
  result = pod(cloud, 'install', *WHERE, '--slices=2')
  assert result.returncode == 0, result.stderr
  for node in ('pod-0', 'pod-1'):
    with tarfile.open(cloud / node / 'maskdiff.tar.gz') as archive:
      names = set(archive.getnames())
    assert {'launch/tpu_pod.sh', 'maskdiff/training/loop.py'} <= names
    assert not [n for n in names if n.startswith('.git/')]
    home = cloud / node / 'maskdiff'
    assert (home / 'maskdiff' / 'training' / 'loop.py').exists()
    assert (cloud / node / 'uv').read_text() == (
      f'{home} pip install --quiet --python .venv/bin/python '
      '-r requirements-tpu.txt\n'
    )


def test_a_bucket_is_mounted_under_gcs(cloud):
  (command,) = dry(cloud, 'mount', *WHERE, '--bucket', 'gs://rows')
  (line,) = [x for x in command[7].splitlines() if 'gcsfuse --' in x]
  assert line.endswith(' rows /gcs/rows')
  assert '--implicit-dirs --rename-dir-limit=' in line


def test_a_folder_of_a_bucket_is_mounted(cloud):
  (command,) = dry(cloud, 'mount', *WHERE, '--bucket', 'gs://rows/my runs/')
  (line,) = [x for x in command[7].splitlines() if 'gcsfuse --' in x]
  words = line.split(' ', 5)[-1]
  assert words == '--only-dir=my\\ runs rows /gcs/rows/my\\ runs'


@pytest.mark.parametrize(
  'arguments, message',
  [
    (('launch', *WHERE), 'unknown command launch'),
    (('stop', '--zone', 'z'), 'stop needs --name'),
    (('stop', '--name', 'pod'), 'stop needs --zone'),
    (('stop', *WHERE, '--slices=none'), '--slices none must be 1 or more'),
    (('stop', *WHERE, '--nodes=2'), 'unknown argument --nodes'),
    (('stop', *WHERE, '--project'), '--project needs a value'),
    (('stop', *WHERE, '--', 'x'), 'stop takes no arguments after --'),
    (('create', *WHERE, '--runtime=r'), 'create needs --type'),
    (('create', *WHERE, '--type=v5e-8'), 'create needs --runtime'),
    (('start', *WHERE), 'start needs the arguments of pretrain.py after --'),
    (
      ('start', *WHERE, '--script=finetune'),
      'start needs the arguments of finetune.py after --',
    ),
    (
      ('start', *WHERE, '--script', 'chat', '--', 'x'),
      '--script chat must be pretrain, finetune, preferences or rl',
    ),
    (('start', *WHERE, '--env=1=x', '--', 'x'), '--env 1 must be KEY=VALUE'),
    (
      ('start', *WHERE, '--env=NO_SUCH', '--', 'x'),
      '--env NO_SUCH: this',
    ),
    (('stop', *WHERE, '--grace=5m'), '--grace 5m must be a number of seconds'),
    (('mount', *WHERE, '--bucket=a//b'), '--bucket a//b must be BUCKET or'),
    (('mount', *WHERE, '--bucket=ab/../c'), '--bucket ab/../c must be BUCKET'),
    (('mount', *WHERE), 'mount needs --bucket'),
  ],
)
def test_wrong_usage_is_one_line(cloud, arguments, message):
  result = pod(cloud, *arguments)
  assert result.returncode == 2
  assert result.stderr.startswith(f'error: {message}')
  assert result.stderr.count('\n') == 1
  assert not (cloud / 'calls').exists()


def test_help_names_every_command(cloud):
  result = pod(cloud, '--help')
  assert result.returncode == 0
  for (
    name
  ) in 'create install mount start watch logs status stop delete'.split():
    assert f'\n  {name} ' in result.stdout


def test_a_failing_host_fails_the_command(cloud):
  (cloud / 'pod-1' / 'maskdiff').rename(cloud / 'elsewhere')
  result = pod(cloud, 'start', *WHERE, '--slices=2', '--', '--workdir', 'x')
  assert result.returncode == 1
