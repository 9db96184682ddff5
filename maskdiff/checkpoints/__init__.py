"""Checkpoints that are verified on restore.

- `checkpoint`: `Checkpointer` saves and restores steps in a directory.
- `restore`: finds the newest undamaged step; verifies a step; rolls back.
- `manifest`: `Meta`, the metadata of a checkpoint.
- `position`: divides the position of a stage into JSON values and arrays.
- `fingerprint`: hash of an array that does not depend on its sharding.
- `orbax_manager`: opens an Orbax CheckpointManager.
"""
