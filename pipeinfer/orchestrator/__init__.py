"""The orchestrator: the machine that decides what is verified, accepted and cancelled."""
