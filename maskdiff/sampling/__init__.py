"""Sampling from a trained network.

Modules, from the request to the answer:

- settings: settings of the compiled program, and of each row
- request: a request and its checks; the first state of the loop
- layouts: requests from prompts, and from texts with gaps
- state: state of the denoising loop
- passes: forward pass of a denoising step, with or without a KV cache
- candidates: tokens drawn from logits, and their confidence
- remasking: rules that select the predictions to commit
- commit: parts of a denoising step after its forward pass
- sampler: the denoising loop; `generate` fills a request
- serve: requests as they come, in a batch of fixed size
- admission: new requests into free rows of this batch
- prompts: prompts from files and from a keyboard
- answers: answers to texts, as launch/sample.py gives them
- output: prints answers, and writes them to files
- recording: step and confidence of every slot of a row
- replay: HTML page that replays the denoising steps
"""
