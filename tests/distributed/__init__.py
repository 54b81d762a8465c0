"""Two real ranks in a real Trainer, on one machine and without a GPU.

``python -m tests.distributed`` prints how far every number of a distributed run is from plain autograd in one process.
"""
