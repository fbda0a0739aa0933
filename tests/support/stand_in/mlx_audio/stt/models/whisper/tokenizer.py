"""As in mlx-audio: the languages that Whisper knows."""

from __future__ import annotations

LANGUAGES = {"en": "english", "de": "german"}
TO_LANGUAGE_CODE = {name: code for code, name in LANGUAGES.items()}
