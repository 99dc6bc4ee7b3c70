"""Translation only: each module turns one wire format into engine calls and back."""
