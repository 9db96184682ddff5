"""Config keys of the guard, which skips bad updates."""

from maskdiff.config.key import Key

KEYS = {
  'spike_sigmas': Key(
    0.0,
    'Skip an update whose loss or gradient norm exceeds the mean of the last '
    '128 steps by this many standard deviations. 0: skip only updates that '
    'are not finite. Small batches have spikes by chance, since loss weights '
    'grow as 1/t.',
    minimum=0,
  ),
  'max_in_a_row': Key(
    10, 'Stop the run after this many consecutive skipped updates.', minimum=1
  ),
}
