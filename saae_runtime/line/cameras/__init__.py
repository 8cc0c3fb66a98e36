"""Cameras of a line: industrial ones, network streams, webcams, recordings, and frames from another program."""
