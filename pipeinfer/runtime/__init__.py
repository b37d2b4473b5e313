"""What runs machines and records them: executor, job description, trace, replay, timeline."""
