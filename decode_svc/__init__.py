"""The receiving end: takes KV in, generates, and streams every step to the router.

Life of a job here (service.py, intake.py):
 1. `submit` of a DECODE job: the transfer is expected, no memory is taken; a WHOLE job goes to the engine at once
 2. `Intake.reserve` at the offer: blocks are lent by the engine, those already cached are pinned
 3. `Intake.write` for each payload, `Intake.publish` once its digests are right; full blocks become shareable
 4. `Intake.ready`: the sequence joins the running batch with its first token
 5. `on_update` after each step: tokens to the router, the first token again in the first frame
"""
