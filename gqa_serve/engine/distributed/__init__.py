"""Tensor parallelism: one model over several processes (ranks), each with a part of weights and KV heads.

`shard.py` says which part, `group.py` what ranks tell each other in a step, `rank.py` is the process of a
rank but the first, `replica.py` the first one's hold on all of them.
"""
