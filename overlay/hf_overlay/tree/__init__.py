"""One session's folder on disk: made from a plan, owned by a lock, and cleared without losing a download."""
