"""The command `saae-line`."""
