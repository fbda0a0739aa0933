"""An OpenAI- and Anthropic-compatible chat server on mlx-lm, for the models an overlay shows.

settings -> app -> api (one file a dialect) -> service -> pool -> engine (the one thread that owns MLX)

A request is decoded by its dialect into a `requests.Request`, rendered to tokens by `chat`, stepped by `worker`, read
back into `events` by `reader`, and encoded by its dialect again.
"""
