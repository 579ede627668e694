"""PRIME's mathematics: torch in, torch out; no process groups, no Megatron."""
