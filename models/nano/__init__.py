"""sana-sprint-nano: a procedural world of captioned images, and the small models that are trained on it."""
