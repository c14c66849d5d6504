"""The hand-off, measured between two processes pinned to a core each: `python -m benchmarks.transfer`, or `make bench-transfer`.

`__main__` asks the questions and writes the rows. `ends` are our two processes; in them `wire` drives the transport alone and
`path` two real agents with real pools. `nixl` starts the opponent's two processes, which run `nixl_end` in their own environment.
"""
