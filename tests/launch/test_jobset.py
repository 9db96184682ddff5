"""launch/jobset.yaml: restarts, signals, and numbers that match the config."""

import math
import pathlib
import runpy

import pytest

from maskdiff import config as config_lib
from maskdiff import errors

yaml = pytest.importorskip('yaml')

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHIPS_PER_HOST = 4  # of v5p


@pytest.fixture
def spec():
  return yaml.safe_load((ROOT / 'launch' / 'jobset.yaml').read_text())['spec']


def test_only_user_errors_are_not_restarted(spec):
  (job,) = spec['replicatedJobs']
  one = job['template']['spec']
  (rule,) = one['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob'
  assert rule['onExitCodes']['operator'] == 'In'
  assert rule['onExitCodes']['values'] == [errors.STATUS_USER]
  (rule,) = spec['failurePolicy']['rules']
  assert rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  # A pod with any other status fails its job, which restarts all jobs.
  assert one['backoffLimit'] == 0
  assert spec['failurePolicy']['maxRestarts'] >= 100


def test_a_preempted_pod_has_time_for_a_checkpoint(spec):
  (job,) = spec['replicatedJobs']
  pod = job['template']['spec']['template']['spec']
  assert pod['terminationGracePeriodSeconds'] >= 120
  (container,) = pod['containers']
  # A shell would not pass on the signal.
  assert container['command'][0] == 'python'


def test_the_numbers_match_each_other_and_the_config(spec):
  (job,) = spec['replicatedJobs']
  slices, one = job['replicas'], job['template']['spec']
  pod = one['template']['spec']
  (container,) = pod['containers']

  topology = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = math.prod(map(int, topology.split('x')))
  assert one['parallelism'] == one['completions'] == chips // CHIPS_PER_HOST
  limits = container['resources']['limits']
  assert limits == {'google.com/tpu': CHIPS_PER_HOST}
  (rule,) = one['podFailurePolicy']['rules']
  assert rule['onExitCodes']['containerName'] == container['name']
  assert pod['restartPolicy'] == 'Never'  # a pod failure policy requires it

  script, *_ = [x for x in container['command'] if x.endswith('.py')]
  assert (ROOT / script).exists()
  arguments = dict(a.removeprefix('--').split('=') for a in container['args'])
  config = runpy.run_path(str(ROOT / arguments.pop('config')))['get_config']()
  assert arguments.pop('workdir').startswith('/gcs/BUCKET/')
  for key, value in arguments.items():
    key = key.removeprefix('config.')
    was = config_lib.lookup(config, key)
    config.update_from_flattened_dict({key: type(was)(value)})
  config_lib.validate(config)
  assert config.mesh.replica == slices
  config_lib.validate_mesh(
    config, dict(replica=slices, fsdp=chips, sequence=1, tensor=1)
  )
