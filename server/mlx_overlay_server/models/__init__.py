"""Which models there are, how they are downloaded, and which are in memory."""
