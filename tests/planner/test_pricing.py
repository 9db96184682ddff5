"""Memory and time of one program as keys of a plan."""

import pytest

from maskdiff.planner import hlo_cost, pricing
from maskdiff.planner.fields import FIELDS


def test_operations_of_a_part_add_up():
  cost = hlo_cost.Cost(total_s=4.0, cycles=10.0, unresolved=['jit(f)/while'])
  cost.unpriced['mine'] += 2
  for name, seconds in (('a', 1.0), ('b', 0.5)):
    op_name = f'jit(f)/{name}/network(mlp gate/up)/bld,df->blf/dot_general'
    cost.operations[op_name] = hlo_cost.Operation(op_name, seconds, 3.0)
  cost.exposed_s['host_in'] = 0.25
  found = pricing.costs(cost)
  assert found['exposed_host_s'] == 0.25
  assert found['operations'] == [
    {
      'part': 'mlp gate/up forward',
      'seconds': 1.5,
      'count': 6.0,
      'op_name': 'jit(f)/a/network(mlp gate/up)/bld,df->blf/dot_general',
      'share': 0.375,
    }
  ]
  assert found['warnings'] == [
    'the trip count of the loop jit(f)/while depends on data; it is counted '
    'once',
    'the time leaves out operations without estimate: mine x2',
  ]
  assert found.keys() <= FIELDS.keys()


@pytest.mark.parametrize(
  'message, gib',
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required '
      'for HLO temporaries (768.00G) exceeds available HBM (30.75G).',
      768,
    ),
    ('Ran out of memory in memory space hbm. Used 17.5G of 15.75G hbm.', 17.5),
    ('Used 1.5T of 15.75G hbm', 1536),
    ('Used 512.0M of 256.0M hbm', 0.5),
    ('another error', None),
  ],
)
def test_needed_memory_is_read_from_the_error(message, gib):
  assert pricing.needed_gib(message) == gib
