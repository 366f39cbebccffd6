"""Checkpoints: folders of safetensors and JSON with hashes, whole or sharded, written in the background."""
