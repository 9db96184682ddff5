"""The JobSet of launch/: its numbers fit each other and the configs."""

import math
import pathlib
import runpy

import pytest

from maskdiff import config as config_lib

yaml = pytest.importorskip('yaml')

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHIPS_PER_HOST = 4  # of v5p


def test_the_numbers_of_the_jobset_fit_each_other():
  spec = yaml.safe_load((ROOT / 'launch' / 'jobset.yaml').read_text())['spec']
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
  assert pod['restartPolicy'] == 'Never'  # a pod failure policy wants it

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
