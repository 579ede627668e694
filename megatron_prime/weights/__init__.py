"""Weights between Hugging Face, Megatron shards and the rollout engine."""
