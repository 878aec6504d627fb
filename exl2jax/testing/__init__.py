"""What several test files share: builders of test data. Nothing here imports the package under test."""
