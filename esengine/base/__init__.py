"""The ground: errors, files, memory, processes, progress. It imports nothing of ours."""
