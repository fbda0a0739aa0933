"""The one thread that owns MLX, and the handle that the rest of the server holds on it."""
