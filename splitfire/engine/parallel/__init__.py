"""Tensor parallelism: one model and one KV pool over the ranks of a worker, each a process with a device of its own.

Life of a step here:
 1. `Leader.compute` (leader.py, rank 0) sends the step's arrays (steps.py) to every follower and computes its own shard.
 2. Each follower (follower.py) computes its shard of the same step, and writes its heads' KV into its part of the pool.
 3. After attention and MLP of each layer all ranks add up what they have (group.py); rank 0 gets the logits together, and draws.
 4. Between steps the pool is rank 0's alone (pools.py): it forks, packs and unpacks blocks of all ranks (pack.py).
"""
