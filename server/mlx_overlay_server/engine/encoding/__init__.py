"""Models that embed or rank texts: the encoders that mlx-lm does not have, pooling, and the runner of such a model."""
