"""OpenAI's chat completions and completions (reference: platform.openai.com/docs/api-reference)."""
