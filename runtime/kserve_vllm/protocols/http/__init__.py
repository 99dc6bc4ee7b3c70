"""What all protocols over HTTP have in common, and the routes that are ours."""
