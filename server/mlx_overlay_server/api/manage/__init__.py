"""The API behind the page: what the server holds and does, and what a person can have it do."""
