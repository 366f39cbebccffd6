"""Checkpoints: folders of safetensors and JSON with hashes, written while training goes on, whole or in shards."""
