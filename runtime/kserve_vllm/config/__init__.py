"""Settings, where each value came from, profiles of engine flags, and the demo model's."""
