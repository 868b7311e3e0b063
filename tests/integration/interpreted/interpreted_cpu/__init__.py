"""A Triton backend named cpu, for tests: with TRITON_INTERPRET=1 kernels are interpreted, and nothing of it is used.

vLLM's CPU build takes Triton for usable, and so its V2 model runner, where a backend of this name exists. With this folder's
parent on PYTHONPATH every process finds it by its entry point.
"""
