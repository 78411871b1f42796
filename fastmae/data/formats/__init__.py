"""Formats whose pixels Pillow cannot give as they are stored: one file each, which says what is one and reads it.

Each has ``is_X(start)``, ``pixels(data, read_as)`` and ``header(data)``; those of several pages have ``places(file)``
and ``page(file, place, read_as)`` too. Sizes are checked by headers, before a library allocates anything.
"""
