"""Examples to copy. Nothing in esengine imports them."""
