"""Policies, schedules, and what they measure."""
