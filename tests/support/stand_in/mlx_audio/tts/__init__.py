"""As in mlx-audio."""
