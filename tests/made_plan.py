"""A plan with made-up numbers."""

from maskdiff.planner.fields import FIELDS


def made_plan(**values):
  """Returns the plan of a train step that fits, with `values` replaced."""
  return dict.fromkeys(FIELDS) | {
    'mode': 'train',
    'status': 'fits',
    'fits': True,
    'topology': 'v5p:4x4x4',
    'num_slices': 2,
    'chip': 'v5p',
    'chips': 128,
    'devices': 128,
    'mesh': 'replica=2,fsdp=64,sequence=1,tensor=1',
    'parameters': 8_015_581_184,
    'length': 4096,
    'batch': 1280,
    'microbatches': 5,
    'rows_per_chip': 2.0,
    'remat': 'minimal',
    'compile_s': 60.0,
    'hbm_arguments_gib': 1.4,
    'hbm_temporaries_gib': 65.0,
    'hbm_total_gib': 66.4,
    'hbm_evaluation_gib': 3.25,
    'hbm_capacity_gib': 95.74,
    'host_gib': 3.5,
    'levers': [],
    'step_s': 2.0,
    'cycles_s': 1.5,
    'attention_s': 0.3,
    'attention_mxu_s': 0.2,
    'rows_s': 0.01,
    'exposed_ici_s': 0.14,
    'exposed_dcn_s': 0.05,
    'exposed_host_s': 0.0,
    'exposed_prefetch_s': 0.0,
    'cycles': 1.5 * 1.75e9,
    'tokens_per_s': 1e6,
    'tokens_per_s_per_chip': 1e6 / 128,
    'model_tflop_per_chip': 100.0,
    'mfu': 0.55,
    'mfu_done': 0.53,
    'mfu_low': 0.45,
    'mfu_high': 0.58,
    'total_tokens': 10**12,
    'days': 11.57,
    'chip_hours': 35_556.0,
    'loss_chunks': 8,
    'collectives': [
      {
        'kind': 'all-gather',
        'axes': 'fsdp',
        'network': 'ici',
        'dtype': 'bf16',
        'count': 450.0,
        'sync_count': 66.0,
        'gb': 29.5,
        'seconds': 0.12,
      }
    ],
    'operations': [
      {
        'part': 'mlp gate/up forward',
        'seconds': 0.6,
        'share': 0.3,
        'count': 64.0,
        'op_name': 'jit(f)/bld,df->blf/dot_general',
      }
    ],
    'warnings': [],
    **values,
  }
