"""The fleet as discrete events: real placement, prefix index, admission and fitted costs over engines that are only formulas.

    trace       what arrives: Mooncake's JSONL, or generated (workloads.py, w8.py)
    engine      what a worker is like, in numbers
    pool        its KV blocks and prefix cache
    lane        its steps, many at once in closed form
    fleet       workers and the router's own counting, on a timeline
    result      what came of it
    advice      the same for every way to divide N workers

Deterministic: a seed and no clock. `splitfire simulate` and `splitfire advise` are its commands (docs/simulation.md).
"""
