"""The network.

- transformer: the Transformer, its config, and its parameters as a tree.
- network: config, parameters and token ids of a trained network.
- layers: the parts of a layer as functions.
- masks: labels of positions and the visibility rule of attention.
- attention: attention on CPU, TPU and GPU; splash: the TPU kernel.
- cached_attention: attention of a window to itself and a KV cache.
- cross_entropy: the loss, without logits of unmasked positions.
- token_nll: the nll per token, differentiable.
- vocabulary_loop: the loops over selected positions of both.
"""
