"""Searching settings: which trials are proposed, their record, and the processes that train them. It knows nothing of
torch: a trial is a command, and what it reached stands in its run folder."""
