"""Recordings to text, and text to speech: mlx-audio in processes of its own, which can be killed."""
