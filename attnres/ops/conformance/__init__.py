"""What an implementation of the read must compute: golden vectors, their contract, and who deviates from them.

`contract.json` and `vectors.safetensors` are the contract, for any language; `vectors.py` makes them from the reference
in fp64. `worker.py` runs an implementation in a process of its own and imports nothing of this package.
"""
