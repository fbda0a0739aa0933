"""OpenAI's routes for sound: recordings to text, and text to speech."""
