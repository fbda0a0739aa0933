"""What Kokoro turns texts into phonemes with, as far as anybody looks for it."""
