"""Prompts, chat templates, micro-batches."""
