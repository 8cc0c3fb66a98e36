"""Servers that a PLC or a line's control talks to; each drives one handshake."""
