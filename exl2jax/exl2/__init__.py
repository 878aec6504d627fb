"""An EXL2 directory: compiled, read back, described and verified."""
