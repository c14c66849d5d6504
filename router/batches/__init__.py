"""OpenAI's files and batches, kept in a directory (`--files-dir`) that the routers of one machine share. decisions/0030.

records.py   a file and a batch as they are stored, and the states of a batch: pure
form.py      a multipart upload, piece by piece: pure
store.py     the directory: whatever ends a process, what is there is whole
rows.py      the answers of one batch, each there once
disk.py      the one thread that does all of this, and errors of the disk as clients see them
run.py       one batch, from its validation to its files
runner.py    which batches this process runs
api.py       /v1/files and /v1/batches
"""
