"""What a run does beside its steps, a feature a file."""
