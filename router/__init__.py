"""The router: accepts, admits, places, dispatches, streams. No torch, no UCX.

Life of a request here (docs/architecture.md has the whole of it):
 1. accept    grpc_api.py or http_api.py, inference.py, text.py   validated, seed drawn, text made token ids
 2. admit     admission.py           waits in a bounded queue, or is refused at once
 3. place     placement.py           a decode worker, and a prefill worker or none
 4. dispatch  flow.py, fleet.py      Submit to both at once
 5. stream    flow.py, text.py       ids are ordered by offset, made text when the client reads
Whatever interrupts an attempt, flow.py submits again elsewhere with the ids already streamed.
"""
