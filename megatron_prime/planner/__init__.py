"""What a run will need, worked out from its configuration: no weights, no torch, no device."""
