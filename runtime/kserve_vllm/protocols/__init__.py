"""Translation between protocols and the engine, and nothing else."""
