"""Differences of experts from a base in signs (`signs`), and bases with the differences that go with them (`fit`)."""
