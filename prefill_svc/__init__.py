"""The sending end: computes prompts, answers with the first token, ships the KV.

Life of a job here (service.py, ship.py):
 1. `submit` queues the prompt with the engine
 2. `on_started`: its first chunk begins, so the transfer is offered (ship.py)
 3. `on_update` after each chunk: what is computed may ship; the first token goes to the router at once
 4. `closed`: received, so the blocks may go; or not, so the router is told that the attempt is over
"""
