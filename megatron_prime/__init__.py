"""PRIME for large models: Megatron-core policy and implicit PRM, resharded rollouts."""

__version__ = "0.1.0"
