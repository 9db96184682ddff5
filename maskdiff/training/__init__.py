"""Training: the loop, the step, and the files of a work directory.

- `loop`: `run`, the whole training; start reading here.
- `stage`: `Stage`, the interface between the loop and a kind of training.
- `pretraining`: the first stage.
- `run_setup`: opens the mesh and the optimizer of a run.
- `resume`: restores the newest checkpoint, or creates the state of a new run.
- `step`: train step and evaluation step, pure functions of arrays.
- `train_state`: parameters, optimizer state, guard state and step number.
- `optimizer`: AdamW, Muon and learning-rate schedules.
- `muon`: Muon, for the matrices of the layers.
- `guard`: skips updates with a spike or a value that is not finite.
- `inputs`: tokenizer, datasets and batches of a config.
- `evaluation`: the bound on held-out text, and samples.
- `reporter`: metrics, progress, samples and skipped updates.
- `saver`: saves checkpoints during a run, and handles failed saves.
- `workdir`: the other files of a work directory.
"""
