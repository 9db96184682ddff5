"""Local files, also those that somebody else wrote or damaged.

- `reading`: bounded reads of regular files, and of JSON.
- `folder`: files of a folder that somebody else made, none outside it.
- `new_folder`: folders that are complete or absent.
- `paths`: paths of mounted buckets, and paths that stay within a folder.
- `atomic`: writes of whole files.
- `lock`: a directory that one process writes.
- `outputs`: files that flags name, checked before long work.
- `streams`: standard input, output and error of a script.
- `appending`: appends to files, also to those that fail for a while.
- `json_text`: writes JSON that strict parsers accept.
"""
