"""Steps on a GPU: what it keeps of each lane (state.py), recorded steps (graphs.py), and the runner that launches one behind the other
(runner.py). Importing the runner imports triton.
"""
