"""Local files, also those that somebody else wrote or damaged.

- `reading`: bounded reads of regular files, and of JSON.
- `paths`: paths of mounted buckets, and paths that stay within a folder.
- `atomic`: writes of whole files.
- `lock`: a directory that one process writes.
"""
