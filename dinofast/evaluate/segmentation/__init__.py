"""What attention and patches say of objects, in images and videos."""
