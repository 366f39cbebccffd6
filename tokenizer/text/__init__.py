"""Text input: sources, UTF-8, special tokens, and the patterns that split text into pretokens."""
