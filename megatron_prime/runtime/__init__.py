"""Processes, phases, figures, and every patch of a dependency."""
