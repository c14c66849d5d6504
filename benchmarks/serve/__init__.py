"""Serving, measured at the client: time to first token, gaps between tokens, tokens a second. `python -m benchmarks.serve`.

One clock for all: `endpoints.ask` sends a prompt of token ids and notes when each token comes, whether the server is ours
(gRPC) or anybody's with OpenAI's streaming HTTP. `contestants` starts servers and lets them take turns, `workloads` are W1
to W5 of the measuring rules, and each other file is one comparison with its rows and targets.
"""
