"""The benchmark harness: candidates in turns, the step, the data path, and the official loop beside
them."""
