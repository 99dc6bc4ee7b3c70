"""`kserve-vllm rollout`: a new model gets its traffic step by step, and loses it where it is worse."""
