"""The network.

- transformer: the Transformer, its config, and its parameters as a tree.
- network: a trained network as one value.
- layers: the parts of a layer as functions.
- masks: who may attend to whom.
- attention: attention on CPU, TPU and GPU; splash: the kernel for TPU.
- cached_attention: attention of a window to a KV cache.
- cross_entropy: the loss, without logits of unmasked positions.
"""
