"""What an operator decides with: commands that read configurations and need neither the engine nor a GPU."""
