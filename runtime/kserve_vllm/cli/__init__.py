"""The commands. The only reader of `sys.argv`."""
