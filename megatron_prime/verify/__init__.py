"""Outcome verifiers: PRIME's only ground truth."""
