"""The stages of a conversion and the checkpointed scan that drives them."""
