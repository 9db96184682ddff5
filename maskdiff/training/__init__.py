"""Training: the loop, the step, and the files of a work directory.

- `loop`: `run`, the whole training; start reading here.
- `run_setup`: opens what a run reads from its config and never changes.
- `resume`: restores the newest checkpoint, or makes the state of a new run.
- `step`: train step and evaluation step, pure functions of arrays.
- `train_state`: the state that a train step changes.
- `optimizer`: AdamW and learning-rate schedules.
- `guard`: decides which updates to skip: loss spikes, not finite.
- `inputs`: tokenizer, datasets and batches of a config.
- `evaluation`: the bound on held-out text, and samples.
- `reporter`: metrics, progress, samples and skipped updates.
- `saver`: checkpoints of a run, and saves that fail.
- `workdir`: the other files of a work directory.
"""
