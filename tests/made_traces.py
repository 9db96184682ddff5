"""Traces of jax.profiler made of events that a test names."""

from jax.profiler import ProfileData


def profile(planes):
  """Returns the ProfileData of events.

  Args:
    planes: {plane: {line: [(name, start, duration, stats)]}}, times in
      nanoseconds; stats is a dict of strings and integers.
  """
  text = ''.join(_plane(name, lines) for name, lines in planes.items())
  return ProfileData.from_serialized_xspace(
    ProfileData.text_proto_to_serialized_xspace(text)
  )


def _plane(name, lines):
  events, stats, text = {}, {}, ''
  number = lambda known, key: known.setdefault(key, len(known) + 1)
  for i, (line, found) in enumerate(lines.items()):
    text += f'lines {{ id: {i + 1} name: "{line}"\n'
    for event, start, duration, values in found:
      text += (
        f'events {{ metadata_id: {number(events, event)} '
        f'offset_ps: {round(start * 1000)} '
        f'duration_ps: {round(duration * 1000)}'
      )
      for key, value in values.items():
        kind = 'str_value' if isinstance(value, str) else 'int64_value'
        value = f'"{value}"' if isinstance(value, str) else value
        text += (
          f' stats {{ metadata_id: {number(stats, key)} {kind}: {value} }}'
        )
      text += ' }\n'
    text += '}\n'
  for field, known in (('event_metadata', events), ('stat_metadata', stats)):
    for key, i in known.items():
      text += f"{field} {{ key: {i} value {{ id: {i} name: '{key}' }} }}\n"
  return f'planes {{ name: "{name}"\n{text}}}\n'


def tpu(programs, instructions, device=0):
  """Returns the plane of a TPU, for `profile`.

  Args:
    programs: [(name, start, duration)] of the line 'XLA Modules'.
    instructions: the same of the line 'XLA Ops'.
    device: number of the device.
  """
  rows = lambda events: [(*event, {}) for event in events]
  return {
    f'/device:TPU:{device}': {
      'XLA Modules': rows(programs),
      'XLA Ops': rows(instructions),
      # Repeats transfers that overlap with instructions.
      'Async XLA Ops': [('copy-start.1', 0, 10**6, {})],
    }
  }


def gpu(streams, module='jit_train_step', device=0):
  """Returns the plane of a GPU, for `profile`.

  Args:
    streams: lists of (name of an instruction, start, duration).
    module: name of the program.
    device: number of the device.
  """
  return {
    f'/device:GPU:{device}': {
      f'Stream #{i}(Compute)': [
        ('kernel', start, duration, {'hlo_op': name, 'hlo_module': module})
        for name, start, duration in events
      ]
      for i, events in enumerate(streams)
    }
  }
