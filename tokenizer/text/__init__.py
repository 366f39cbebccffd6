"""Text on its way in: sources, UTF-8, special tokens, the pretokens that a pattern cuts it into."""
