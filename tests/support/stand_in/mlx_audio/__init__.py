"""mlx-audio as far as the server uses it, for where it is not installed: models that do what the request says."""
