"""The models of the overlay: finding them, downloading them, and keeping them in memory."""
