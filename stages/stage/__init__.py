"""The stage: the machine that computes some layers of the target."""
