"""Adapters (LoRA) that change without a restart."""
