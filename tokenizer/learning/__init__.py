"""From counted pretokens to merges."""
