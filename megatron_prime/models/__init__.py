"""The only door to Megatron-core and Transformer Engine models."""
