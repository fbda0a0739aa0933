"""An OpenAI-compatible chat server on mlx-lm that runs on an overlay. Nothing is served yet."""
