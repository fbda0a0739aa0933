"""A request and its answer as plain values, and the way between text and tokens. Knows neither HTTP nor MLX."""
