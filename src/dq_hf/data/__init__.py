"""Images, streams and code caches, for training and for measuring."""
