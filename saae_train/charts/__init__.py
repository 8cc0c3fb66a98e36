"""Charts and sheets of pictures."""
