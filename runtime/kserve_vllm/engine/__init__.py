"""The only room that touches vLLM's engine: its adapter, the profiles of engine flags, and the demo model."""
