"""Formats whose pixels Pillow cannot give as they are stored: one file each, which says what is one and reads it."""
