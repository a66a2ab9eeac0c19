"""A file a command: its options as a dataclass, and `run(options)`."""
