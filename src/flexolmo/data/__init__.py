"""Token shards from other people's files: read, clean, de-duplicate, split, tokenize."""
