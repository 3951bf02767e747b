"""Checks of the book's sources; they run on any machine with Python, none of them changes it."""
