"""Train part embeddings on examples."""
