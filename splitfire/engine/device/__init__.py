"""Steps on a GPU: what it keeps of each lane (state.py), recorded steps (graphs.py), and the runner that launches one behind the other
(runner.py), all of which import triton; and its part in hand-offs (handoff.py), which does not.
"""
