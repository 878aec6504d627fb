"""Verification: an EXL2 directory read back and held against everything the format demands."""
