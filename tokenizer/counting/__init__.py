"""How often each pretoken occurs: hash tables, spilled to disk where memory ends, summed in one order."""
