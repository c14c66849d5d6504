"""Moves KV blocks between two workers: a sans-IO protocol over a transport. Knows byte slots, not tensors; no gRPC, no torch.

Life of a hand-off (sender | receiver; the tables are in protocol.py, the driver is agent.py):
 1. sender offers, with the one-time token both ends got from the router
 2. receiver reserves pool blocks and grants, naming the first block it does not have | waits | refuses | redirects: it has no
    room, and the router may name another receiver for the same blocks
 3. for each computed chunk the sender says how much it wants; the receiver lends ring slots, receives posted
 4. sender packs blocks into the lent slot where it can reach it, else into a send slot, and sends; receiver writes them to its
    pool where nobody sees them, verifies digests, publishes, lends again
 5. sender commits with the first token; when every block is verified the receiver says received, and the hold ends
A receiver short of blocks for what runs revokes; the sender answers `stopped` and waits for another grant, blocks in hand.
Either side may abort; slots that were lent are then filled with a void, so every posted receive completes.
"""
