"""What can be loaded, from where, and why: folders and caches are scanned, and a plan of the tree is made."""
