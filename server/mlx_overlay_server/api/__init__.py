"""How the server is asked and answered: a folder for each family of clients, and what they all share."""
