"""Ranking documents, in the shape that Jina's and Cohere's clients share."""
