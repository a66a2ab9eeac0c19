"""Features of many images, in a file."""
