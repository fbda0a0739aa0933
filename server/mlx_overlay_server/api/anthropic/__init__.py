"""Anthropic's messages, count_tokens and models (reference: docs.anthropic.com/en/api/messages)."""
