"""Other people's ways to do the same work, measured in one run beside ours."""
