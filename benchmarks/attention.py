"""Compares attention kernels with dense attention, by attention regime.

python benchmarks/attention.py [--length 4096] [--rounds 10]

Prints the share of the L^2 scores that the tiles of the splash kernel cover.
If `auto` has a kernel for this machine, also prints the seconds of a forward
and backward pass with dense attention and with the kernel, and their ratio.
B=1, 8 heads of 128, bfloat16.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from timing import alternate

from maskdiff.distributed import chips, compiler
from maskdiff.distributed.mesh import make_mesh
from maskdiff.model import attention, masks, splash

REGIMES = {
  'bidirectional': masks.bidirectional,
  'causal': masks.causal,
  'block-causal of 32': lambda valid: masks.block_causal(valid, 32),
  'block diffusion of 32': lambda valid: masks.block_diffusion(
    valid[:, ::2], 32
  ),
}


def share_of_tiles(regime, length, chip):
  """Returns the scores in the tiles of the forward kernel, divided by L^2."""
  kernel = splash.make_kernel(regime, length, chip=chip)
  sizes = kernel.kwargs['block_sizes']
  computed = (kernel.fwd_mask_info.block_mask > 0).sum()
  return int(computed) * sizes.block_q * sizes.block_kv / length**2


def compare(labels, length, rounds):
  """Returns the seconds of (dense, kernel); None without a kernel."""
  q, k, v, g = jax.random.normal(
    jax.random.key(0), (4, 1, 8, length, 128), jnp.bfloat16
  )
  kernel = attention.fastest(q, k, labels, labels)
  if kernel == 'xla':
    return None

  options = compiler.options(make_mesh(devices=jax.devices()[:1]))

  @functools.partial(jax.jit, static_argnums=0, compiler_options=options)
  def pass_through(implementation, q, k, v, g):
    attend = lambda *x: attention.attend(*x, labels, labels, implementation)
    out, pullback = jax.vjp(attend, q, k, v)
    return out, pullback(g)

  calls = {
    name: functools.partial(pass_through, name, q, k, v, g)
    for name in ('xla', kernel)
  }
  return tuple(alternate(calls, rounds).values())


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--length', type=int, default=4096)
  parser.add_argument('--rounds', type=int, default=10)
  args = parser.parse_args()
  kind = attention.device_kind()
  chip = chips.by_kind(kind)
  print(f'{kind}, L={args.length}')
  for name, make in REGIMES.items():
    labels = make(jnp.ones((1, args.length), bool))
    share = share_of_tiles(labels.regime, args.length, chip and chip.name)
    line = f'{name}: tiles cover {share:.0%}'
    if seconds := compare(labels, args.length, args.rounds):
      dense, kernel = seconds
      line += f', {dense:.4f} s dense, {kernel:.4f} s, {dense / kernel:.1f} x'
    print(line)


if __name__ == '__main__':
  main()
