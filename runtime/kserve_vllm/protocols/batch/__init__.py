"""OpenAI's files and batches: what is kept of them, who works on them, and their routes."""
