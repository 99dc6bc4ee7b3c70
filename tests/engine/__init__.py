"""What a real engine answers."""
