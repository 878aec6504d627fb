"""From costs to bits: which settings every linear gets, so that the whole reaches the target."""
