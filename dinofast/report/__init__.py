"""What runs came to: a table, and a page with curves and pictures."""
