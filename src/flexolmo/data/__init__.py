"""From other people's files to token shards: fetch, read, clean, de-duplicate, split, tokenize."""
