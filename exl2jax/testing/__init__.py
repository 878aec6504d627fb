"""Builders of test data that several test files share. Nothing here imports the package under test."""
