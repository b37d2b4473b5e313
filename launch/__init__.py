"""Launching: which rank plays what, starting ranks, and the driver that runs their machines over MPI."""
