"""Nearest neighbors: pictures, and the official protocols of retrieval and copy detection."""
