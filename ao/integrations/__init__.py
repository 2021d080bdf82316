"""Where other libraries and the command line meet `ao`."""
