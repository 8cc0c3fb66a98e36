"""Frames from what a command line names: files, video, cameras, watched folders."""
