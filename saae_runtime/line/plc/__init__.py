"""Servers for a PLC or a line's control; each drives one handshake."""
