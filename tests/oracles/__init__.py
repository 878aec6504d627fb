"""Reference implementations: plain NumPy loops written from the formulas, sharing no code with the package."""
