"""Weights in and out: other projects' files and folders, read and written, tensor by tensor."""
