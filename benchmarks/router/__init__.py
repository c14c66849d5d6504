"""The router alone: real processes and the real protocol, but workers without a model (fake_worker.py), so that what is measured is the
router's. It has a core for itself; workers and clients share the other.
"""
