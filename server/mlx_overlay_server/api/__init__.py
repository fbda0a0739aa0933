"""The HTTP interface: a folder for each family of clients, and the modules that all of them share."""
