"""Errors, files, memory, processes, progress. It imports no other package of esengine."""
