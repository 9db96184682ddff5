"""Estimates of the KL divergence from samples of the policy.

Each is a function of gap = log policy - log other, of tokens or of answers. For
samples of the policy, k1 and k3 have the divergence as their mean, and k2 has
it to second order in the gap (Schulman, Approximating KL Divergence, 2020).

As terms of a loss, they are differentiated for fixed samples. The mean of the
gradient of k1 is then 0, so k1 adds only noise. That of k2 is the gradient of
the divergence. That of k3 is the gradient of the reverse divergence.
"""

import jax.numpy as jnp


def k1(gap):
  return gap


def k2(gap):
  return gap**2 / 2


def k3(gap):
  return jnp.expm1(-gap) + gap


ESTIMATES = {'k1': k1, 'k2': k2, 'k3': k3}
