"""How the server is asked and answered: one file a dialect."""
