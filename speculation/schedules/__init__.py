"""Policies, schedules, and the estimators that schedules use."""
