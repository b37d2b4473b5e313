"""The drafter: the machine that guesses."""
