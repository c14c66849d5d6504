"""What both roles share: attach to routers, host the engine thread, report load, drain, health.

A worker process hosts both ends of a hand-off; its role is what it announces. `serve.py` joins the ends.
"""
