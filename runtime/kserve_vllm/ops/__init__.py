"""Tools for the people who run the service, from a laptop or a Job: nothing here imports the engine."""
