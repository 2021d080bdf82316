"""The command line: `ao` and `python -m ao`.

Nothing here imports torch before a command needs it, and modules of this folder import each other only, so that
ao_command.py can load the folder by itself: `ao inspect` answers before torch would have been imported.
"""
