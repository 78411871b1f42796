"""What a run folder tells, read whatever its state, and the page about runs that is made of it; and maps of points.

Nothing here knows how a run trains. run_folder.py needs neither torch nor matplotlib.
"""
