"""The commands that print: a file per command, from its settings to tables, pictures and lines of JSON."""
