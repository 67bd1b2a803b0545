"""The experiment: does SLOT help? `python -m study` runs it; study/README.md is its protocol."""
