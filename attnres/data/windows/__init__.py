"""From shards to windows of tokens, in an order that is a function of seed and step."""
