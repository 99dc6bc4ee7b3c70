"""`kserve-vllm top`: what a server, or all pods of a service, do at this moment."""
