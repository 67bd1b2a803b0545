"""The course: sixteen exercises, from RMSNorm to an experiment on SLOT. See README.md."""
