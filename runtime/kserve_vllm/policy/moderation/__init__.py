"""Hooks that look at prompts and answers."""
