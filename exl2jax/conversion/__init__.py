"""The job: its settings, its work directory, its passes in order, and its result."""
