"""KV caches that are kept on disk, where they survive a restart: files, their format, and the threads that use them."""
