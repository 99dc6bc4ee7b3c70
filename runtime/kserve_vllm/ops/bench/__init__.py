"""`kserve-vllm bench`: load on a server, what its clients saw, and two such results compared."""
