"""Scans folders and caches for what can be loaded, explains what cannot, and plans the tree."""
