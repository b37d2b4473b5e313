"""Launching: starting and watching ranks, the MPI transport, and the driver that runs a rank's machines."""
