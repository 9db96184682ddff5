"""Config keys of a drafter, which guesses tokens after the next one."""

from maskdiff.config.key import Key, require

KEYS = {
  'kind': Key(
    'none',
    'Drafter of objective drafting. medusa: heads with vocabulary matrices of '
    'their own, on the last hidden state. mtp: heads of one layer each, beside '
    'the last layer. block: a small Transformer that fills a block of masks '
    'and attends to hidden states of the network, as in DFlash.',
    ('none', 'medusa', 'mtp', 'block'),
  ),
  'layers': Key(5, 'Layers of the drafter of kind block.', minimum=1),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  drafts, kind = c.objective.name == 'drafting', c.drafter.kind
  require(
    drafts == (kind != 'none'),
    f'config.objective.name={c.objective.name} and config.drafter.kind={kind}: '
    'a drafter is trained with objective drafting; set both '
    '--config.objective.name=drafting and --config.drafter.kind',
  )
  if not drafts:
    return
  length = c.objective.window_length
  require(
    length >= 2,
    f'config.objective.window_length={length} leaves nothing to draft: it '
    'counts the next token and the drafts after it; set '
    '--config.objective.window_length to at least 2',
  )
  require(
    c.model.layers >= 2 or kind != 'mtp',
    'config.drafter.kind=mtp reads the input of the last of several layers, '
    f'and config.model.layers={c.model.layers}; set '
    '--config.drafter.kind=medusa',
  )
  require(
    c.objective.denominator == 'token',
    f'config.objective.denominator={c.objective.denominator} divides by rows, '
    'and a row may have no draft; set --config.objective.denominator=token',
  )
  require(
    not c.lora.rank,
    f'config.lora.rank={c.lora.rank} trains adapters, and objective drafting a '
    'drafter: train one after the other, with --config.lora.rank=0 now',
  )
  require(
    c.train.ema_decay == 0 or c.objective.autoregressive_weight > 0,
    f'config.train.ema_decay={c.train.ema_decay} keeps an average of all '
    'parameters, of which only the drafter is trained; set '
    '--config.train.ema_decay=0',
  )
