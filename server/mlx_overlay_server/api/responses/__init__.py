"""OpenAI's Responses, the dialect that Codex speaks (reference: platform.openai.com/docs/api-reference/responses)."""
