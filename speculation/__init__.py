"""Speculation: the token tree, the policies that choose what to verify, and the drafter that proposes."""
