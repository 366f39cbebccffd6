"""Encoding of text to ids, and decoding."""
