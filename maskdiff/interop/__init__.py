"""Published checkpoints in and out; launch/convert.py is the way in."""
