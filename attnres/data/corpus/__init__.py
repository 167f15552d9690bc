"""From text to token shards, split by document."""
