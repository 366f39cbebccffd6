"""Learn merges from counted pretokens."""
