"""The networks: ViT, head, and student and teacher behind one forward."""
