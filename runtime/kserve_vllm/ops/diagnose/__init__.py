"""`kserve-vllm diagnose`: what is wrong with a service, why, and the command that mends it. It only reads."""
