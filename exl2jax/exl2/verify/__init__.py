"""Verification: an EXL2 directory is read back and checked against every rule of the format."""
