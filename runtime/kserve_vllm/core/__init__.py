"""The ground floor: errors, the request context, the lifecycle, watched files. Imports nothing of ours from above."""
