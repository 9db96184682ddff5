"""The network.

- transformer: the Transformer, its config, and its parameters as a tree.
- network: config, parameters and token ids of a trained network.
- layers: the parts of a layer as functions.
- ntk: rotary positions of rows longer than those of the training.
- masks: labels of positions and the visibility rule of attention.
- attention: attention on CPU, TPU and GPU; splash: the TPU kernel.
- cache: the KV cache, with the labels of its positions.
- cached_attention: attention of a window to itself and a KV cache.
- cross_entropy: the loss, without logits of unmasked positions.
- token_nll: the nll per token, with gradients.
- vocabulary_loop: the loop of cross_entropy and token_nll over chunks of
  selected positions.
"""
