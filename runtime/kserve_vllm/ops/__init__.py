"""Tools for the people who run a service, from a laptop or a Job: nothing here imports the engine or wants a GPU."""
