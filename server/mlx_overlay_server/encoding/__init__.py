"""Texts that are embedded or ranked: requests, what is known of a model that does so, and texts as tokens."""
