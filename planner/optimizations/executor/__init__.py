"""How layers are run: whole, or in passes over the sequence."""
