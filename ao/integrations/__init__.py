"""Other libraries that know `ao`'s numbers, and the command line.

Importing one of these modules registers `ao` with the library it is named after.
"""
