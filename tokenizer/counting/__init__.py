"""Count pretokens: hash tables, spilled to disk beyond a memory limit, and merged in a fixed order."""
