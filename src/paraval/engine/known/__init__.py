"""What the storage knows already of what is submitted, and who else works on the same search."""
