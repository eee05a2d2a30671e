"""What a run and an evaluation share: a step's images, rendered and scored chunk by chunk."""
