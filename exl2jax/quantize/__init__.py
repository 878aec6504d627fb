"""One module from full-precision weights to packed tensors, corrected for the errors before it."""
